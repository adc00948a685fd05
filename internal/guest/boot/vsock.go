package boot

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/link"
)

// vsockPort implements link.Port on connections to a vsock port, of which one is
// served at a time. A clone's VMM resets the connections that the golden VM had,
// and the golden VM's own resets them too: to the link its host has gone, and comes back.
type vsockPort struct {
	listener *os.File
	raw      syscall.RawConn // of listener

	mu      sync.Mutex
	conn    *os.File // guarded by mu; nil while there is none
	blocked bool     // guarded by mu: between Interrupt and Restore
}

// listenVsock takes a port's number as the kernel's command line has it.
func listenVsock(port string) (*vsockPort, error) {
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port: %w", err)
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", n, err)
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(n)})
	if err == nil {
		err = unix.Listen(fd, 4)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on vsock port %d: %w", n, err), unix.Close(fd))
	}
	return newVsockPort(fd)
}

// newVsockPort takes over a listening socket that does not block.
func newVsockPort(fd int) (*vsockPort, error) {
	f := os.NewFile(uintptr(fd), "vsock") // in Go's poller, as it does not block
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &vsockPort{listener: f, raw: raw}, nil
}

// Read implements link.Port.
func (p *vsockPort) Read(b []byte) (int, error) {
	conn, err := p.accepted()
	if err != nil {
		return 0, err
	}
	// However the connection ended, the next one may be better.
	n, err := conn.Read(b)
	if err == nil {
		return n, nil
	}
	p.mu.Lock()
	p.conn = nil
	p.mu.Unlock()
	conn.Close()
	return 0, link.ErrHostGone
}

// accepted returns the connection, and waits for one if there is none.
func (p *vsockPort) accepted() (*os.File, error) {
	p.mu.Lock()
	conn := p.conn
	p.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	fd := -1
	var acceptErr error
	err := p.raw.Read(func(l uintptr) bool {
		fd, _, acceptErr = unix.Accept4(int(l), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		// One that was reset while it waited is no reason to stop.
		return acceptErr != unix.EAGAIN && acceptErr != unix.EINTR && acceptErr != unix.ECONNABORTED
	})
	if err == nil {
		err = acceptErr
	}
	if err != nil {
		return nil, fmt.Errorf("accept vsock connection: %w", err)
	}
	conn = os.NewFile(uintptr(fd), "vsock")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn = conn
	if p.blocked {
		_ = conn.SetWriteDeadline(time.Unix(1, 0))
	}
	return conn, nil
}

// Write implements link.Port. What is written while no host is there is lost, as
// is the session that it belongs to.
func (p *vsockPort) Write(b []byte) (int, error) {
	p.mu.Lock()
	conn := p.conn
	p.mu.Unlock()
	if conn == nil {
		return 0, link.ErrHostGone
	}
	return conn.Write(b)
}

// Interrupt implements link.Port.
func (p *vsockPort) Interrupt() { p.block(true, time.Unix(1, 0)) }

// Restore implements link.Port.
func (p *vsockPort) Restore() { p.block(false, time.Time{}) }

func (p *vsockPort) block(blocked bool, deadline time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blocked = blocked
	if p.conn != nil {
		_ = p.conn.SetWriteDeadline(deadline)
	}
}
