//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Poller waits for the events of many userfaultfds (epoll(7)). Its methods may be
// called concurrently, Close after all others have returned.
//
// It tells of each event once (EPOLLET): who is told reads until nothing is left
// (see [Buffer.Full]), or is not told again. One waiter is told, not all.
type Poller struct {
	epoll int
	stop  int // an eventfd
}

// stopKey is the eventfd's.
const stopKey = -1

// NewPoller returns a poller that waits for nothing yet.
func NewPoller() (*Poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make poller: %w", err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(epoll)
		return nil, fmt.Errorf("make poller: %w", err)
	}
	p := &Poller{epoll: epoll, stop: stop}
	// Not EPOLLET: it is never read, so that it tells everybody.
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, stop, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: stopKey}); err != nil {
		p.Close()
		return nil, fmt.Errorf("make poller: %w", err)
	}
	return p, nil
}

// Add begins to wait for f's events, which are told as key, not negative. What
// waits already is told as well.
func (p *Poller) Add(f *FD, key int32) error {
	return f.Use(func(fd int) error {
		err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: key})
		if err != nil {
			return fmt.Errorf("poll userfaultfd: %w", err)
		}
		return nil
	})
}

// Remove ends that. It must precede [FD.Close]: another descriptor of the same
// userfaultfd, in another process, would keep it in the poller for ever.
func (p *Poller) Remove(f *FD) error {
	return f.Use(func(fd int) error {
		if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil); err != nil {
			return fmt.Errorf("stop polling userfaultfd: %w", err)
		}
		return nil
	})
}

// Keys is space for what Wait returns.
type Keys struct {
	events [16]unix.EpollEvent
	keys   [16]int32
}

// Wait waits until there are events, and returns whose; none after the timeout,
// of which a negative one is endless and fractions of a millisecond are cut. The result is
// valid until k is used again. After [Poller.Stop] it returns [ErrClosed].
func (p *Poller) Wait(k *Keys, timeout time.Duration) ([]int32, error) {
	ms := -1
	if timeout >= 0 {
		ms = int(timeout / time.Millisecond)
	}
	for {
		n, err := unix.EpollWait(p.epoll, k.events[:], ms)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("wait for userfaultfds: %w", err)
		}
		for i, e := range k.events[:n] {
			if e.Fd == stopKey {
				return nil, ErrClosed
			}
			k.keys[i] = e.Fd
		}
		return k.keys[:n], nil
	}
}

// Stop lets all waiters go, now and ever after.
func (p *Poller) Stop() error {
	if _, err := unix.Write(p.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		return fmt.Errorf("stop poller: %w", err)
	}
	return nil
}

// Close gives up the poller's descriptors.
func (p *Poller) Close() {
	_ = unix.Close(p.stop)
	_ = unix.Close(p.epoll)
}
