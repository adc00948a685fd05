//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// poller waits for a userfaultfd in the runtime's epoll, so that a session costs
// a goroutine and no thread. It works on a duplicate, made when first needed,
// because an os.File that owned the number could close it under an ioctl.
type poller struct {
	mu      sync.Mutex
	file    *os.File
	conn    syscall.RawConn
	stopped bool
}

func (p *poller) open(f *FD) (syscall.RawConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil, ErrClosed
	}
	if p.conn != nil {
		return p.conn, nil
	}
	err := f.Use(func(fd int) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		file := os.NewFile(uintptr(dup), "userfaultfd")
		conn, err := file.SyscallConn()
		if err != nil {
			return errors.Join(err, file.Close())
		}
		p.file, p.conn = file, conn
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("poll userfaultfd: %w", err)
	}
	return p.conn, nil
}

// stop lets waiters go, and closes the duplicate: as long as one descriptor is
// open the kernel goes on queueing faults. It must precede the lock that Close
// takes, which those waiters may hold.
func (p *poller) stop() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	p.stopped = true
	if p.file == nil {
		return nil
	}
	return p.file.Close()
}

func (p *poller) isStopped() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stopped
}

// WaitReadable waits for events and hands them to read, which is called whenever
// there may be some, at once for the first time, and which reads until nothing is
// left. It returns when read says to stop (false), or with [ErrClosed] after
// Close. read must not call Close, which waits for it.
func (f *FD) WaitReadable(read func() (more bool)) error {
	conn, err := f.poller.open(f)
	if err != nil {
		return err
	}
	if err := conn.Read(func(uintptr) bool { return !read() }); err != nil {
		if f.poller.isStopped() {
			return ErrClosed
		}
		return fmt.Errorf("poll userfaultfd: %w", err)
	}
	return nil
}
