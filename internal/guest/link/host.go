package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"fcvm/internal/guest/proto"
)

// Host is the host's end of one session. Its methods may be called concurrently.
type Host struct {
	conn net.Conn
	mux  *yamux.Session
	wg   sync.WaitGroup

	// write is held (one token) by whoever writes to conn, and from Quiesce to
	// Resume; a channel, so that waiting can be given up.
	write chan struct{}
	buf   []byte // guarded by write

	quiet chan uint32 // sequence numbers of QUIESCED frames

	mu       sync.Mutex
	seq      uint32 // guarded by mu: last QUIESCE
	quiesced bool   // guarded by mu: Quiesce holds write
	failed   bool   // guarded by mu: nothing new starts

	once sync.Once
	err  error // written once, before done is closed
	done chan struct{}
}

// Dial greets the guest until it answers or ctx ends. It owns conn from then on;
// when it fails conn is closed.
func Dial(ctx context.Context, conn net.Conn) (*Host, error) {
	return NewPending(conn).Session(ctx)
}

// start begins a session on a connection whose guest was greeted.
func start(conn net.Conn, p *parser) (*Host, error) {
	h := &Host{
		conn:  conn,
		write: make(chan struct{}, 1),
		quiet: make(chan uint32, 1),
		done:  make(chan struct{}),
	}
	pr, pw := io.Pipe()
	mux, err := yamux.Client(&transport{PipeReader: pr, write: h.writeData, done: func() {}}, muxConfig())
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("start session: %w", err)
	}
	h.mux = mux
	h.wg.Go(func() {
		err := h.read(p, pw)
		pw.CloseWithError(err)
		h.fail(err)
	})
	h.wg.Go(func() {
		// Only the host opens streams.
		if _, err := mux.Accept(); err == nil {
			h.fail(fmt.Errorf("the guest opened a stream: %w", proto.ErrMalformed))
			return
		}
		h.fail(errSessionOver)
	})
	return h, nil
}

// read passes frames on until the stream ends or breaks.
func (h *Host) read(p *parser, pw *io.PipeWriter) error {
	for {
		f, err := p.next()
		if errors.Is(err, errGarbage) {
			return fmt.Errorf("%w: %w", err, proto.ErrMalformed)
		}
		if err != nil {
			return err
		}
		switch f.kind {
		case kindData:
			if _, err := pw.Write(f.payload); err != nil {
				return err
			}
		case kindQuiesced:
			if len(f.payload) == 4 {
				select {
				case h.quiet <- binary.BigEndian.Uint32(f.payload):
				default: // nobody waits for it
				}
			}
		case kindBye:
			// All DATA before it went through the pipe, so yamux has it. The guest
			// waits for this answer, but not for long.
			h.spawn(func() {
				_ = h.send(context.Background(), kindBye, nil)
			})
		case kindAck, kindIdentified: // of a repeated greeting
		default:
			return fmt.Errorf("frame of kind %d: %w", f.kind, proto.ErrMalformed)
		}
	}
}

// Open opens a stream and calls begin, which may write to it. The stream's Close
// returns at once, and never waits for the guest.
func (h *Host) Open(ctx context.Context, begin func(io.Writer) error) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	type opened struct {
		s   net.Conn
		err error
	}
	// yamux waits without regard to deadlines until what it sends is written, and
	// while the link is quiesced nothing is.
	c := make(chan opened, 1)
	started := h.spawn(func() {
		s, err := h.mux.OpenStream()
		if err == nil {
			if err = begin(s); err != nil {
				s.Close()
			}
		}
		c <- opened{&stream{Conn: s, host: h}, err}
	})
	if !started {
		return nil, fmt.Errorf("open stream: %w", h.Err())
	}
	select {
	case o := <-c:
		if o.err != nil {
			return nil, fmt.Errorf("open stream: %w", o.err)
		}
		return o.s, nil
	case <-ctx.Done():
		h.spawn(func() {
			if o := <-c; o.err == nil {
				o.s.Close()
			}
		})
		return nil, context.Cause(ctx)
	}
}

// stream is a yamux stream whose Close does not wait.
type stream struct {
	net.Conn
	host *Host
	once sync.Once
}

// Close implements net.Conn.
func (s *stream) Close() error {
	s.once.Do(func() {
		_ = s.Conn.SetDeadline(time.Unix(1, 0)) // fails on a closed stream only
		s.host.spawn(func() { s.Conn.Close() }) // else the session's end closes it
	})
	return nil
}

// spawn runs f in a goroutine that Close waits for, unless the session has ended.
func (h *Host) spawn(f func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failed {
		return false
	}
	h.wg.Go(f)
	return true
}

// Quiesce stops both directions at a frame's end. After an error they go on. A
// second Quiesce waits for [Host.Resume].
func (h *Host) Quiesce(ctx context.Context) error {
	if err := h.lock(ctx); err != nil {
		return fmt.Errorf("quiesce: %w", err)
	}
	h.mu.Lock()
	h.seq++
	seq := h.seq
	h.quiesced = true
	h.mu.Unlock()
	err := h.put(kindQuiesce, binary.BigEndian.AppendUint32(nil, seq))
	for err == nil {
		select {
		case got := <-h.quiet:
			if got == seq {
				return nil
			}
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-h.done:
			err = h.err
		}
	}
	_ = h.Resume(context.WithoutCancel(ctx)) // the first error is the one to tell
	return fmt.Errorf("quiesce: %w", err)
}

// Resume ends what [Host.Quiesce] began; it does nothing when that did not.
func (h *Host) Resume(context.Context) error {
	h.mu.Lock()
	was := h.quiesced
	h.quiesced = false
	h.mu.Unlock()
	if !was {
		return nil
	}
	defer h.unlock()
	if err := h.put(kindResume, nil); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	return nil
}

// Done is closed when the session has ended.
func (h *Host) Done() <-chan struct{} { return h.done }

// Err says why the session ended, once Done is closed.
func (h *Host) Err() error {
	select {
	case <-h.done:
		return h.err
	default:
		return nil
	}
}

// Close ends the session. It returns when nothing of it runs any more.
func (h *Host) Close() error {
	h.fail(net.ErrClosed)
	h.wg.Wait()
	return nil
}

func (h *Host) fail(err error) {
	h.once.Do(func() {
		h.err = err
		close(h.done) // lets go of writers that wait in lock
		h.conn.Close()
		// yamux's Close waits for our reader, which may be the caller.
		h.spawn(func() { h.mux.Close() })
		h.mu.Lock()
		h.failed = true
		h.mu.Unlock()
	})
}

// writeData implements the transport's Write.
func (h *Host) writeData(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+maxPayload)]
		if err := h.send(context.Background(), kindData, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

func (h *Host) send(ctx context.Context, k kind, payload []byte) error {
	if err := h.lock(ctx); err != nil {
		return err
	}
	defer h.unlock()
	return h.put(k, payload)
}

// put writes a frame; the caller holds write. What was not written to its end ends the
// session, which the reader may learn only later.
func (h *Host) put(k kind, payload []byte) error {
	h.buf = appendFrame(h.buf[:0], k, payload)
	_, err := h.conn.Write(h.buf)
	if err != nil {
		h.fail(err)
	}
	return err
}

func (h *Host) lock(ctx context.Context) error {
	select {
	case h.write <- struct{}{}:
		select {
		case <-h.done:
			h.unlock()
			return h.err
		default:
			return nil
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-h.done:
		return h.err
	}
}

func (h *Host) unlock() { <-h.write }
