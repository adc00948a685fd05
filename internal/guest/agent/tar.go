package agent

import (
	"errors"
	"fmt"
	"io"
	"net"

	"fcvm/internal/guest/proto"
)

// tarChunk is a compromise: a yamux stream's window is 256 KiB.
const tarChunk = 32 << 10

// readError marks an error of the local source, as opposed to the connection.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }

func sendTar(w io.Writer, tar io.Reader) error {
	fw := proto.NewFrameWriter(w)
	buf := make([]byte, tarChunk)
	for {
		n, err := tar.Read(buf)
		if n > 0 {
			if err := fw.Write(proto.FrameStdin, buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return fw.Write(proto.FrameStdinEOF, nil)
		}
		if err != nil {
			return &readError{err}
		}
	}
}

// tarReader turns the frames of a copy-out back into a byte stream.
type tarReader struct {
	s    net.Conn
	stop func() bool
	info proto.FileInfo
	buf  [proto.MaxPayload]byte
	rest []byte
	err  error
}

// Info describes what is being copied.
func (t *tarReader) Info() proto.FileInfo { return t.info }

// Read implements io.Reader.
func (t *tarReader) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		if t.err != nil {
			return 0, t.err
		}
		f, err := proto.ReadFrame(t.s, t.buf[:])
		switch {
		case errors.Is(err, io.EOF):
			t.err = fmt.Errorf("copy from the guest: %w", io.ErrUnexpectedEOF)
		case err != nil:
			t.err = fmt.Errorf("copy from the guest: %w", err)
		case f.Type == proto.FrameStdout:
			t.rest = f.Payload
		case f.Type == proto.FrameExit:
			t.err = io.EOF
		case f.Type == proto.FrameError:
			t.err = f.Err()
		default:
			t.err = fmt.Errorf("copy from the guest: %w", proto.ErrMalformed)
		}
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

// Close implements io.Closer.
func (t *tarReader) Close() error {
	t.stop()
	return t.s.Close()
}
