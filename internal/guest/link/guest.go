package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"fcvm/internal/guest/proto"
)

// ErrHostGone is returned by a [Port]'s Read when the host closed its end; it
// may come back.
var ErrHostGone = errors.New("host is gone")

// Port is the guest's end of the byte stream.
type Port interface {
	// Read returns ErrHostGone once whenever the host goes away, and blocks
	// until there is data again.
	Read([]byte) (int, error)
	// Write writes all or nothing.
	Write([]byte) (int, error)
	// Interrupt makes blocked and future writes fail; Restore ends that.
	Interrupt()
	Restore()
}

// Handler is what the guest does with what the link brings.
type Handler interface {
	// Handle serves a stream that the host opened, in a goroutine of its own, and
	// closes it.
	Handle(net.Conn)
	// BeforeSnapshot is called when a snapshot may come, AfterSnapshot when the
	// same guest goes on. Both are of Serve's goroutine, as is Identify, which
	// gives a clone its identity.
	BeforeSnapshot()
	AfterSnapshot()
	Identify(identity []byte) error
}

// Guest is the guest's end of the link.
type Guest struct {
	port    Port
	handler Handler

	write  chan struct{} // held (one token) by whoever writes to port, and while frozen
	buf    []byte        // guarded by write
	frozen bool          // between QUIESCE and RESUME; used by Serve's goroutine alone

	identified []byte   // answer to the last IDENTIFY; used by Serve's goroutine alone
	stale      *session // of the golden VM's host, to be closed; likewise

	mu   sync.Mutex
	cur  *session       // guarded by mu
	byes chan struct{}  // the host's BYE
	wg   sync.WaitGroup // everything but Serve itself
}

// session is what one HELLO began.
type session struct {
	nonce [nonceSize]byte
	mux   *yamux.Session
	pipe  *io.PipeWriter
	over  atomic.Bool
	done  chan struct{} // closed when over
}

// NewGuest returns a Guest on port.
func NewGuest(port Port, handler Handler) *Guest {
	return &Guest{port: port, handler: handler, write: make(chan struct{}, 1), byes: make(chan struct{}, 1),
		buf: make([]byte, 0, maxFrame), identified: make([]byte, 0, 256)}
}

// Serve runs sessions until the port fails, which a virtio-serial port never
// does, and then waits for all of its handlers.
func (g *Guest) Serve() error {
	p := newParser(g.port)
	for {
		f, err := p.next()
		switch {
		case errors.Is(err, ErrHostGone):
			// Nobody reads what a process writes to its streams now: let go of them.
			g.end()
			p.r.Reset(g.port)
			continue
		case errors.Is(err, errGarbage):
			// What was lost may have been DATA. The host begins anew.
			g.end()
			continue
		case err != nil:
			g.end()
			g.finishStale()
			g.wg.Wait()
			return err
		}
		if err := g.frame(f); err != nil {
			g.end()
		}
	}
}

func (g *Guest) frame(f frame) error {
	switch f.kind {
	case kindHello:
		return g.hello(f.payload)
	case kindData:
		if s := g.session(); s != nil {
			_, err := s.pipe.Write(f.payload)
			return err
		}
	case kindQuiesce:
		if !g.frozen {
			g.write <- struct{}{}
			g.frozen = true
			g.handler.BeforeSnapshot()
		}
		return g.put(kindQuiesced, f.payload)
	case kindResume:
		g.thaw()
	case kindIdentify:
		return g.identify(f.payload)
	case kindBye:
		select {
		case g.byes <- struct{}{}:
		default:
		}
	}
	return nil
}

// hello begins a session, or answers a repeated greeting of the present one.
func (g *Guest) hello(payload []byte) error {
	_, nonce, err := parseHello(payload)
	if err != nil {
		return err
	}
	answer := append([]byte{proto.Version}, nonce[:]...)
	if s := g.session(); s != nil && s.nonce == nonce {
		return g.send(nil, kindAck, answer)
	}
	g.end()
	g.finishStale()
	s := &session{nonce: nonce, done: make(chan struct{})}
	pr, pw := io.Pipe()
	s.pipe = pw
	t := &transport{PipeReader: pr, write: func(b []byte) (int, error) { return g.writeData(s, b) }, done: s.finish}
	if s.mux, err = yamux.Server(t, muxConfig()); err != nil {
		return err
	}
	g.mu.Lock()
	g.cur = s
	g.mu.Unlock()
	g.wg.Go(func() { g.accept(s) })
	return g.send(nil, kindAck, answer)
}

func (g *Guest) accept(s *session) {
	for {
		conn, err := s.mux.Accept()
		if err != nil {
			s.mux.Close()
			return
		}
		g.wg.Go(func() { g.handler.Handle(conn) })
	}
}

func (s *session) finish() {
	if s.over.CompareAndSwap(false, true) {
		close(s.done)
		s.pipe.CloseWithError(errSessionOver)
	}
}

func (g *Guest) session() *session {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.cur
}

// end ends the present session, and gives the write token back that a writer of
// it or QUIESCE may hold. It does not wait for the session's handlers.
func (g *Guest) end() {
	g.mu.Lock()
	s := g.cur
	g.cur = nil
	g.mu.Unlock()
	g.thaw()
	if s == nil {
		return
	}
	s.finish()
	g.port.Interrupt()
	g.write <- struct{}{} // the writer is out
	g.port.Restore()
	<-g.write
	g.wg.Go(func() { s.mux.Close() })
}

func (g *Guest) thaw() {
	if g.frozen {
		g.frozen = false
		g.handler.AfterSnapshot()
		<-g.write
	}
}

// identify answers first, for which somebody waits, and then ends the session of
// the golden VM's host, which is not this one's.
func (g *Guest) identify(payload []byte) error {
	if len(payload) < nonceSize {
		return fmt.Errorf("identity of %d bytes", len(payload))
	}
	nonce := payload[:nonceSize]
	if len(g.identified) < nonceSize || !bytes.Equal(nonce, g.identified[:nonceSize]) {
		g.identified = append(g.identified[:0], nonce...)
		if err := g.handler.Identify(payload[nonceSize:]); err != nil {
			g.identified = append(g.identified, err.Error()...)
		}
	}
	if !g.frozen {
		g.end()
		return g.send(nil, kindIdentified, g.identified)
	}
	err := g.put(kindIdentified, g.identified) // Serve itself holds write
	if s := g.session(); s != nil && s.mux.NumStreams() == 0 {
		g.leave(s)
	} else {
		g.end()
	}
	return err
}

// leave puts the work of ending a session without streams off until a host
// comes: in most clones none ever does, and a hundred that start together all have
// other things to do.
func (g *Guest) leave(s *session) {
	g.mu.Lock()
	g.cur = nil
	g.mu.Unlock()
	g.stale = s
	g.frozen = false
	<-g.write
}

// finishStale ends what leave left.
func (g *Guest) finishStale() {
	s := g.stale
	if s == nil {
		return
	}
	g.stale = nil
	g.handler.AfterSnapshot()
	s.finish()
	g.wg.Go(func() { s.mux.Close() })
}

// Bye tells the host that nothing more will come, and waits, at most for the
// given time, until it has read all that came before.
func (g *Guest) Bye(wait time.Duration) {
	s := g.session()
	if s == nil {
		return
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if !g.lock(ctx, s) {
		return
	}
	err := g.put(kindBye, nil)
	<-g.write
	if err != nil {
		return
	}
	select {
	case <-g.byes:
	case <-s.done:
	case <-t.C:
	}
}

func (g *Guest) writeData(s *session, b []byte) (int, error) {
	n := 0
	for n < len(b) {
		part := b[n:min(len(b), n+maxPayload)]
		if err := g.send(s, kindData, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// lock takes the write token, unless ctx or s ends before. A nil s never ends.
func (g *Guest) lock(ctx context.Context, s *session) bool {
	var over chan struct{}
	if s != nil {
		over = s.done
	}
	select {
	case <-over:
		return false
	case <-ctx.Done():
		return false
	case g.write <- struct{}{}:
	}
	if s != nil && s.over.Load() {
		<-g.write
		return false
	}
	return true
}

func (g *Guest) send(s *session, k kind, payload []byte) error {
	if !g.lock(context.Background(), s) {
		return errSessionOver
	}
	defer func() { <-g.write }()
	return g.put(k, payload)
}

// put writes a frame; the caller holds write.
func (g *Guest) put(k kind, payload []byte) error {
	g.buf = appendFrame(g.buf[:0], k, payload)
	_, err := g.port.Write(g.buf)
	return err
}
