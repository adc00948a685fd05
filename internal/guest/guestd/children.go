package guestd

import (
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reaper is the [Children] of PID 1: it reaps its own processes and all orphans.
type Reaper struct {
	// mu is held across fork and registration, so that a process which ends at
	// once is not reaped as a stranger.
	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus // guarded by mu
	signals chan os.Signal
	done    chan struct{}
}

// NewReaper returns a running Reaper. A process has one.
func NewReaper() *Reaper {
	r := &Reaper{
		waiting: map[int]chan syscall.WaitStatus{},
		signals: make(chan os.Signal, 1),
		done:    make(chan struct{}),
	}
	signal.Notify(r.signals, unix.SIGCHLD)
	go func() {
		defer close(r.done)
		for range r.signals {
			r.reap()
		}
	}()
	return r
}

// Close stops reaping.
func (r *Reaper) Close() {
	signal.Stop(r.signals)
	close(r.signals)
	<-r.done
}

// Start implements [Children].
func (r *Reaper) Start(start func() (int, error)) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := start()
	if err != nil {
		return 0, nil, err
	}
	c := make(chan syscall.WaitStatus, 1)
	r.waiting[pid] = c
	return pid, c, nil
}

// reap takes all that have ended: one SIGCHLD may stand for many.
func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if c := r.waiting[pid]; c != nil {
			c <- ws
			delete(r.waiting, pid)
		}
	}
}
