package guestd

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pumps read a process's output until its end.
type pumps struct {
	files   []*os.File
	drained sync.WaitGroup // all that the process itself wrote was passed on
	ended   sync.WaitGroup // nobody has the other ends open any more
}

// pump begins to pass p's output on. On a TTY all of it is stdout.
func (p *process) pump(stdout, stderr func([]byte)) *pumps {
	ps := &pumps{}
	if p.master != nil {
		ps.add(p.master, stdout)
	} else {
		ps.add(p.stdout, stdout)
		ps.add(p.stderr, stderr)
	}
	return ps
}

func (ps *pumps) add(f *os.File, sink func([]byte)) {
	ps.files = append(ps.files, f)
	ps.drained.Add(1)
	ps.ended.Go(func() {
		over := pump(f, sink)
		ps.drained.Done()
		if !over {
			pump(f, func([]byte) {})
		}
	})
}

// drain returns when all was passed on that was written before it was called.
// Call it once, after the process's end.
func (ps *pumps) drain() {
	for _, f := range ps.files {
		// Wakes a pump that waits; it then takes what is there, and no more.
		_ = f.SetReadDeadline(time.Unix(1, 0))
	}
	ps.drained.Wait()
}

// wait returns when nobody can write any more.
func (ps *pumps) wait() { ps.ended.Wait() }

// pump calls sink with all that f delivers: until its end, or until f's read
// deadline has passed and nothing more is there at once. It tells which.
func pump(f *os.File, sink func([]byte)) (over bool) {
	buf := make([]byte, 16<<10)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			sink(buf[:n])
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return true // io.EOF; EIO from a TTY whose last user is gone
		}
	}
	_ = f.SetReadDeadline(time.Time{})
	for {
		n, err := 0, error(nil)
		e := control(f, func(fd int) error {
			n, err = unix.Read(fd, buf) // it does not block: the poller has made it so
			return nil
		})
		if e != nil || (err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)) || (err == nil && n == 0) {
			return true
		}
		if n > 0 {
			sink(buf[:n])
		} else if errors.Is(err, unix.EAGAIN) {
			return false
		}
	}
}
