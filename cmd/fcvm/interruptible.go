//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// interruptible reads a file, and can be woken from a Read that blocks. A read
// of a terminal can't be ended otherwise: closing the file doesn't, and Go's
// poller takes only files that it opened non-blocking, a setting that standard
// input shares with the shell.
type interruptible struct {
	f    *os.File
	wake [2]*os.File // a pipe; closing the second end wakes Read
}

func newInterruptible(f *os.File) (*interruptible, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	return &interruptible{f: f, wake: [2]*os.File{r, w}}, nil
}

// Read reads from the file. After interrupt the error is os.ErrClosed.
func (i *interruptible) Read(b []byte) (int, error) {
	for {
		if err := i.wait(); err != nil {
			return 0, err
		}
		n, err := unix.Read(int(i.f.Fd()), b)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return 0, fmt.Errorf("read standard input: %w", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// wait waits until there is something to read, or the end. A pidfd has something
// when its process has ended. After interrupt the error is os.ErrClosed.
func (i *interruptible) wait() error {
	fds := []unix.PollFd{
		{Fd: int32(i.wake[0].Fd()), Events: unix.POLLIN},
		{Fd: int32(i.f.Fd()), Events: unix.POLLIN},
	}
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		if fds[0].Revents != 0 {
			return os.ErrClosed
		}
		return nil
	}
}

// interrupt ends the Read that runs and all later ones.
func (i *interruptible) interrupt() { _ = i.wake[1].Close() }

// close releases the pipe, once nobody reads any more. The file stays open.
func (i *interruptible) close() { _ = i.wake[0].Close() }
