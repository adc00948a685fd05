// Package guesttest runs a guest's agent inside a test's own process, behind a
// port that behaves as a virtio-serial port does: it outlives its hosts, and what a
// host left half written stays in it.
package guesttest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"fcvm/internal/guest/link"
)

// Port is a link.Port without a kernel.
type Port struct {
	mu          sync.Mutex
	changed     *sync.Cond
	in          []byte   // guarded by mu: from hosts, not read yet
	host        net.Conn // guarded by mu: nil while there is none
	gone        bool     // guarded by mu: Read has still to tell that the host went
	interrupted bool     // guarded by mu
	closed      bool     // guarded by mu
	written     int64    // guarded by mu
	wg          sync.WaitGroup
}

// NewPort returns a Port without a host.
func NewPort() *Port {
	p := &Port{}
	p.changed = sync.NewCond(&p.mu)
	return p
}

// maxQueued bounds the queue towards the guest as a virtqueue does.
const maxQueued = 256 << 10

// Dial connects a host; the one before must have closed.
func (p *Port) Dial() net.Conn {
	p.mu.Lock()
	for p.host != nil {
		p.changed.Wait()
	}
	return p.connect()
}

// Clone connects a host as one does to a clone: the guest is not told that the
// golden VM's host is not there.
func (p *Port) Clone() net.Conn {
	p.mu.Lock()
	return p.connect()
}

// connect is called with mu held, and unlocks it.
func (p *Port) connect() net.Conn {
	ours, theirs := net.Pipe()
	p.host = ours
	// A guest that has not noticed yet that a host went never will: the driver tells
	// of the present only.
	p.gone = false
	p.changed.Broadcast()
	p.mu.Unlock()
	p.wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := ours.Read(buf)
			p.mu.Lock()
			for len(p.in) > maxQueued && !p.closed {
				p.changed.Wait()
			}
			p.in = append(p.in, buf[:n]...)
			if err != nil && p.host == ours {
				p.host, p.gone = nil, true
			}
			p.changed.Broadcast()
			p.mu.Unlock()
			if err != nil {
				ours.Close()
				return
			}
		}
	})
	return theirs
}

// Read implements link.Port.
func (p *Port) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.in) == 0 && !p.gone && !p.closed {
		p.changed.Wait()
	}
	switch {
	case len(p.in) > 0:
		n := copy(b, p.in)
		p.in = p.in[n:]
		p.changed.Broadcast()
		return n, nil
	case p.closed:
		return 0, io.EOF
	}
	p.gone = false
	return 0, link.ErrHostGone
}

// Write implements link.Port.
func (p *Port) Write(b []byte) (int, error) {
	p.mu.Lock()
	for p.host == nil && !p.interrupted && !p.closed {
		p.changed.Wait()
	}
	host, interrupted, closed := p.host, p.interrupted, p.closed
	p.written += int64(len(b))
	p.mu.Unlock()
	switch {
	case interrupted:
		return 0, os.ErrDeadlineExceeded
	case closed:
		return 0, io.ErrClosedPipe
	}
	if _, err := host.Write(b); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		return 0, err
	}
	return len(b), nil // a device that loses its host drops what it has
}

// Written is the number of bytes that the guest has written, or is about to.
func (p *Port) Written() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.written
}

// Interrupt implements link.Port.
func (p *Port) Interrupt() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.interrupted = true
	p.changed.Broadcast()
}

// Restore implements link.Port.
func (p *Port) Restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.interrupted = false
}

// Close ends the port and waits until nothing of it runs.
func (p *Port) Close() {
	p.mu.Lock()
	p.closed = true
	if p.host != nil {
		p.host.Close()
	}
	p.changed.Broadcast()
	p.mu.Unlock()
	p.wg.Wait()
}
