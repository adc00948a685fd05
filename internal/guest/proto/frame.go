// Package proto is what the host and the guest's agent say to each other: the
// frames of a process's streams, the records of the guest's log port, and the
// JSON of requests.
//
// It holds no connection and no state. Everything here that parses treats its
// input as hostile: lengths are checked before memory is taken, and nothing that
// the other side sends can make more than [MaxMessage] be held.
package proto

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// FrameType says what a [Frame] carries.
type FrameType uint8

// The types of frames. Client to process: FrameStdin, FrameStdinEOF,
// FrameResize, FrameSignal. Process to client: FrameReady first, then
// FrameStdout and FrameStderr, and FrameExit or FrameError last. FrameMore and
// FrameMessage carry the JSON of requests and answers, before a stream of
// frames begins.
const (
	FrameStdin    FrameType = 1
	FrameStdinEOF FrameType = 2
	FrameStdout   FrameType = 3
	FrameStderr   FrameType = 4
	FrameResize   FrameType = 5 // rows, cols: two big-endian uint16
	FrameSignal   FrameType = 6 // name of a signal without SIG, such as "TERM"
	FrameExit     FrameType = 7 // exit code, big-endian int32
	FrameError    FrameType = 8 // JSON of [Error]
	FrameReady    FrameType = 9 // the process runs, or the client is attached
	FrameMore     FrameType = 10
	FrameMessage  FrameType = 11
)

const (
	// MaxPayload is the largest payload of a frame, in bytes.
	MaxPayload = 64 << 10
	// MaxMessage is the largest JSON of one request or answer, in bytes.
	MaxMessage = 1 << 20
	headerSize = 5
)

// ErrMalformed is wrapped by every error about bytes that break the protocol.
var ErrMalformed = errors.New("malformed data from the other side")

// Frame is one unit of a stream.
type Frame struct {
	Type    FrameType
	Payload []byte
}

// Error is the payload of FrameError. Code is what the process would have
// exited with: 125 for fcvm's own errors, 126 when the command cannot be
// executed, 127 when it is not found.
type Error struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// ReadFrame reads one frame. The payload lies in buf when that is large enough
// and is then valid until buf is used again. The error is io.EOF when r ended
// between frames.
func ReadFrame(r io.Reader, buf []byte) (Frame, error) {
	if cap(buf) < headerSize {
		buf = make([]byte, headerSize)
	}
	head := buf[:headerSize]
	if _, err := io.ReadFull(r, head); err != nil {
		return Frame{}, err
	}
	f := Frame{Type: FrameType(head[0])}
	n := binary.BigEndian.Uint32(head[1:])
	if f.Type < FrameStdin || f.Type > FrameMessage || n > MaxPayload {
		return Frame{}, fmt.Errorf("read frame: type %d of %d bytes: %w", f.Type, n, ErrMalformed)
	}
	if int(n) > cap(buf) {
		buf = make([]byte, n)
	}
	f.Payload = buf[:n]
	if _, err := io.ReadFull(r, f.Payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	return f, nil
}

// WriteFrame writes one frame with a single Write. The payload holds at most
// [MaxPayload] bytes.
func WriteFrame(w io.Writer, t FrameType, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("write frame: payload of %d bytes is over %d", len(payload), MaxPayload)
	}
	_, err := w.Write(appendFrame(make([]byte, 0, headerSize+len(payload)), t, payload))
	return err
}

func appendFrame(b []byte, t FrameType, payload []byte) []byte {
	b = append(b, byte(t))
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// FrameWriter writes frames of several goroutines onto one stream, without
// taking memory for each.
type FrameWriter struct {
	mu  sync.Mutex
	w   io.Writer // guarded by mu, so that frames never mix
	buf []byte    // guarded by mu
}

// NewFrameWriter returns a FrameWriter on w.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// Write writes one frame. It may be called concurrently.
func (fw *FrameWriter) Write(t FrameType, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("write frame: payload of %d bytes is over %d", len(payload), MaxPayload)
	}
	fw.mu.Lock()
	defer fw.mu.Unlock()
	fw.buf = appendFrame(fw.buf[:0], t, payload)
	_, err := fw.w.Write(fw.buf)
	return err
}

// Exit writes FrameExit.
func (fw *FrameWriter) Exit(code int) error { return fw.Write(FrameExit, ExitPayload(code)) }

// Fail writes FrameError.
func (fw *FrameWriter) Fail(e *Error) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode error: %w", err)
	}
	if len(b) > MaxPayload {
		return fw.Fail(&Error{Code: e.Code, Message: e.Message[:1024] + " …"})
	}
	return fw.Write(FrameError, b)
}

// ExitPayload encodes the payload of FrameExit.
func ExitPayload(code int) []byte {
	return binary.BigEndian.AppendUint32(nil, uint32(int32(code)))
}

// ExitCode decodes the payload of FrameExit.
func (f Frame) ExitCode() (int, error) {
	if f.Type != FrameExit || len(f.Payload) != 4 {
		return 0, fmt.Errorf("decode exit frame: %w", ErrMalformed)
	}
	return int(int32(binary.BigEndian.Uint32(f.Payload))), nil
}

// ResizePayload encodes the payload of FrameResize.
func ResizePayload(rows, cols uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, rows), cols)
}

// Size decodes the payload of FrameResize.
func (f Frame) Size() (rows, cols uint16, err error) {
	if f.Type != FrameResize || len(f.Payload) != 4 {
		return 0, 0, fmt.Errorf("decode resize frame: %w", ErrMalformed)
	}
	return binary.BigEndian.Uint16(f.Payload), binary.BigEndian.Uint16(f.Payload[2:]), nil
}

// Err decodes the payload of FrameError: an *[Error], or why there is none.
func (f Frame) Err() error {
	e := &Error{}
	if f.Type != FrameError || json.Unmarshal(f.Payload, e) != nil {
		return fmt.Errorf("decode error frame: %w", ErrMalformed)
	}
	return e
}

// WriteMessage writes v as JSON, in as many frames as it needs.
func WriteMessage(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(b) > MaxMessage {
		return fmt.Errorf("encode message: %d bytes are over the limit of %d; arguments and environment must be smaller", len(b), MaxMessage)
	}
	for len(b) > MaxPayload {
		if err := WriteFrame(w, FrameMore, b[:MaxPayload]); err != nil {
			return err
		}
		b = b[MaxPayload:]
	}
	return WriteFrame(w, FrameMessage, b)
}

// ReadMessage reads what [WriteMessage] wrote into v. When the other side
// answers with FrameError instead, the error is an *[Error].
func ReadMessage(r io.Reader, v any) error {
	var all []byte
	for {
		f, err := ReadFrame(r, nil)
		if err != nil {
			return fmt.Errorf("read message: %w", err)
		}
		switch f.Type {
		case FrameError:
			return f.Err()
		case FrameMore, FrameMessage:
		default:
			return fmt.Errorf("read message: frame of type %d: %w", f.Type, ErrMalformed)
		}
		if len(all)+len(f.Payload) > MaxMessage || (f.Type == FrameMore && len(f.Payload) == 0) {
			return fmt.Errorf("read message: over %d bytes: %w", MaxMessage, ErrMalformed)
		}
		all = append(all, f.Payload...)
		if f.Type == FrameMessage {
			break
		}
	}
	if err := json.Unmarshal(all, v); err != nil {
		return fmt.Errorf("read message: %w: %w", err, ErrMalformed)
	}
	return nil
}
