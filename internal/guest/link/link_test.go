package link_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/guest/guesttest"
	"fcvm/internal/guest/link"
	"fcvm/internal/guest/proto"
)

// serve runs a guest that echoes on every stream.
func serve(t *testing.T, handle func(net.Conn)) (*guesttest.Port, *link.Guest) {
	t.Helper()
	p := guesttest.NewPort()
	return p, run(t, p, handle)
}

func run(t *testing.T, p *guesttest.Port, handle func(net.Conn)) *link.Guest {
	if handle == nil {
		handle = func(c net.Conn) {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}
	}
	g := link.NewGuest(p, handler(handle))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve() // ends with the port
	}()
	t.Cleanup(func() {
		p.Close()
		<-done
	})
	return g
}

// handler is a link.Handler of a guest that only serves streams.
type handler func(net.Conn)

func (h handler) Handle(c net.Conn)     { h(c) }
func (h handler) BeforeSnapshot()       {}
func (h handler) AfterSnapshot()        {}
func (h handler) Identify([]byte) error { return nil }

func timeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t *testing.T, conn net.Conn) *link.Host {
	t.Helper()
	h, err := link.Dial(timeout(t), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func open(t *testing.T, h *link.Host) net.Conn {
	t.Helper()
	s, err := h.Open(timeout(t), nothing)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func nothing(io.Writer) error { return nil }

// echo sends data through s and wants it back.
func echo(t *testing.T, s net.Conn, data []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(data)
		sent <- err
	}()
	got := make([]byte, len(data))
	if _, err := io.ReadFull(s, got); err != nil {
		t.Fatalf("read echo: %v", err)
	}
	if err := <-sent; err != nil {
		t.Fatalf("write: %v", err)
	}
	if !bytes.Equal(got, data) {
		t.Fatal("the echo differs from what was sent")
	}
}

func TestEcho(t *testing.T) {
	p, _ := serve(t, nil)
	h := dial(t, p.Dial())
	var wg sync.WaitGroup
	for range 5 {
		s := open(t, h)
		data := make([]byte, 300<<10)
		_, _ = rand.Read(data)
		wg.Go(func() { echo(t, s, data) })
	}
	wg.Wait()
}

// A guest that waits for the rest of an earlier host's frame must hear the next
// host all the same.
func TestHalfFrameOfEarlierHost(t *testing.T) {
	p, _ := serve(t, nil)
	first := dial(t, p.Dial())
	echo(t, open(t, first), []byte("one"))
	first.Close()

	half := p.Dial()
	// A header that promises the largest frame, and one byte of it.
	if _, err := half.Write([]byte("\xfcLNK\x03\x00\x7f\xf4\x00\x00\x00\x00x")); err != nil {
		t.Fatal(err)
	}
	echo(t, open(t, dial(t, closing{half})), []byte("two"))
}

// closing is a connection that was used before.
type closing struct{ net.Conn }

func TestGarbageBeforeGreeting(t *testing.T) {
	for name, garbage := range map[string][]byte{
		"zeros":       make([]byte, 100_000),
		"text":        []byte(strings.Repeat("login: ", 999)),
		"half magic":  []byte("\xfcLN"),
		"magics":      bytes.Repeat([]byte("\xfcLNK"), 20_000),
		"bad version": []byte("\xfcLNK\x01\x00\x00\x11"),
	} {
		t.Run(name, func(t *testing.T) {
			p, _ := serve(t, nil)
			conn := p.Dial()
			if _, err := conn.Write(garbage); err != nil {
				t.Fatal(err)
			}
			echo(t, open(t, dial(t, conn)), []byte("hello"))
		})
	}
}

// What a guest sends before its answer belongs to another session; what it
// sends after is this one's end when it makes no sense.
func TestGarbageFromGuest(t *testing.T) {
	p := guesttest.NewPort()
	conn := p.Dial()
	go func() {
		_, _ = p.Write(make([]byte, 70_000)) // Dial fails if these do
		_, _ = p.Write([]byte("\xfcLNK\x03\x00\x00\x01\x00\x00\x00\x00!"))
		run(t, p, nil)
	}()
	h := dial(t, conn)
	s := open(t, h)
	echo(t, s, []byte("fine"))
	if _, err := p.Write([]byte("garbage")); err != nil {
		t.Fatal(err)
	}
	// The frame after the garbage shows it.
	_, _ = s.Write([]byte("more")) // may fail already
	select {
	case <-h.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the session outlived garbage")
	}
	if !errors.Is(h.Err(), proto.ErrMalformed) {
		t.Errorf("Err() = %v, want ErrMalformed", h.Err())
	}
}

func TestNoGuest(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	p := guesttest.NewPort()
	defer p.Close()
	if _, err := link.Dial(ctx, p.Dial()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Dial = %v, want DeadlineExceeded", err)
	}
}

func TestQuiesce(t *testing.T) {
	p, _ := serve(t, nil)
	h := dial(t, p.Dial())
	s := open(t, h)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer h.Close()
	defer close(stop)
	// Traffic in both directions, all the time.
	wg.Go(func() { _, _ = io.Copy(io.Discard, s) })
	wg.Go(func() {
		for buf := make([]byte, 8<<10); ; {
			select {
			case <-stop:
				s.Close()
				return
			default:
				if _, err := s.Write(buf); err != nil {
					return
				}
			}
		}
	})
	for range 50 {
		if err := h.Quiesce(timeout(t)); err != nil {
			t.Fatal(err)
		}
		before := p.Written()
		time.Sleep(time.Millisecond)
		if after := p.Written(); after != before {
			t.Fatalf("the guest wrote %d bytes while quiesced", after-before)
		}
		if err := h.Resume(timeout(t)); err != nil {
			t.Fatal(err)
		}
	}
	echo(t, open(t, h), []byte("still here"))
}

// A clone is a guest that was quiesced by a host that it never hears of again.
func TestGreetingEndsQuiesce(t *testing.T) {
	ended := make(chan struct{}, 1)
	p, _ := serve(t, func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
		select {
		case ended <- struct{}{}:
		default:
		}
	})
	golden := dial(t, p.Dial())
	s := open(t, golden)
	echo(t, s, []byte("golden"))
	if err := golden.Quiesce(timeout(t)); err != nil {
		t.Fatal(err)
	}
	golden.Close()
	clone := dial(t, p.Dial())
	echo(t, open(t, clone), []byte("clone"))
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the golden VM's stream lives on in the clone")
	}
}

// A host that goes away while the guest writes must not leave the writer stuck:
// it is a container's output.
func TestHostGoneReleasesWriter(t *testing.T) {
	released := make(chan struct{}, 1)
	p, _ := serve(t, func(c net.Conn) {
		defer c.Close()
		for buf := make([]byte, 64<<10); ; {
			if _, err := c.Write(buf); err != nil {
				released <- struct{}{}
				return
			}
		}
	})
	h := dial(t, p.Dial())
	s := open(t, h)
	if _, err := io.ReadFull(s, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	h.Close()
	select {
	case <-released:
	case <-time.After(20 * time.Second):
		t.Fatal("the writer is stuck")
	}
}

func TestBye(t *testing.T) {
	write := make(chan struct{})
	p, g := serve(t, func(c net.Conn) {
		<-write
		_, _ = c.Write([]byte("last words"))
		c.Close()
	})
	h := dial(t, p.Dial())
	s := open(t, h)
	close(write)
	got, err := io.ReadAll(s)
	if err != nil || string(got) != "last words" {
		t.Fatalf("read %q, %v", got, err)
	}
	start := time.Now()
	g.Bye(time.Minute)
	if time.Since(start) > 30*time.Second {
		t.Error("Bye waited for its whole time though the host answers")
	}
}

// deafConn is a connection whose other end takes no more, and has not hung up yet.
type deafConn struct {
	net.Conn
	deaf atomic.Bool
}

func (c *deafConn) Write(b []byte) (int, error) {
	if c.deaf.Load() {
		return 0, syscall.EPIPE
	}
	return c.Conn.Write(b)
}

// A session whose frame cannot be written is over when that is told.
func TestWriteFailureEndsSession(t *testing.T) {
	p, _ := serve(t, nil)
	c := &deafConn{Conn: p.Dial()}
	h := dial(t, c)
	c.deaf.Store(true)
	if err := h.Quiesce(timeout(t)); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("error %v, want EPIPE", err)
	}
	select {
	case <-h.Done():
	default:
		t.Error("the session goes on")
	}
}

func TestCloseIsIdempotent(t *testing.T) {
	p, _ := serve(t, nil)
	h := dial(t, p.Dial())
	for range 3 {
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Open(context.Background(), nothing); err == nil {
		t.Error("a closed session opened a stream")
	}
	if err := h.Quiesce(context.Background()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Quiesce after Close = %v", err)
	}
}
