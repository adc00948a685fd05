//go:build linux

package pageserver

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// answer is what a fault gets.
type answer struct {
	fault
	off int64 // of the page in the memory file
	// data is placed as the clone's own page. Without it: wake alone, when the
	// page is to be found in the template; else zeros.
	data []byte
	wake bool
}

// answerNow answers a fault from the goroutine that read it: what is in the page
// cache needs no other, and passing it on would cost more than the answer. The
// rest is left to answerFaults.
func (s *session) answerNow(f fault) error {
	again, err := s.serve(f, true)
	slow := errors.Is(err, errSlow)
	if err != nil && !slow {
		return err
	}
	if again || slow {
		s.mu.Lock()
		if slow {
			s.queue = append(s.queue, f)
		} else {
			s.park(f)
		}
		s.work.Signal()
		s.mu.Unlock()
	}
	return nil
}

// answerFaults takes faults from the queue until the session ends.
func (s *session) answerFaults() {
	const shortest, longest = 20 * time.Microsecond, time.Millisecond
	retryIn := shortest
	for {
		f, ok := s.next(retryIn)
		if !ok {
			return
		}
		again, err := s.serve(f, false)
		if err != nil {
			s.end(err)
			return
		}
		if !again {
			retryIn = shortest
			continue
		}
		retryIn = min(2*retryIn, longest)
		s.mu.Lock()
		s.park(f)
		s.mu.Unlock()
	}
}

// park keeps a fault that the kernel does not let be answered for now. The
// caller holds mu.
func (s *session) park(f fault) {
	s.parked = append(s.parked, f)
	s.stats.Retries++
}

// serve answers a page fault. It says again when the kernel does not let it for
// now. With now, what has to be waited for is errSlow.
func (s *session) serve(f fault, now bool) (again bool, _ error) {
	r, ok := s.region(f.addr)
	if !ok {
		return false, fmt.Errorf("fault at %#x, which is in no region of the guest's memory", f.addr)
	}
	a := answer{fault: f, off: int64(r.Offset + f.addr - r.Addr)}
	s.mu.Lock()
	removed := s.isRemoved(a.off)
	s.mu.Unlock()
	if removed {
		return s.place(a)
	}
	read := s.server.source.read
	var buf []byte
	if now {
		read = s.server.source.readNow
		if s.pageSize > window {
			return false, errSlow
		}
		if buf = s.server.buffers.tryGet(); buf == nil {
			return false, errSlow
		}
	} else {
		buf = s.server.buffers.get()
	}
	defer func() { s.server.buffers.put(buf) }()
	var err error
	if s.server.template != nil {
		err = s.share(&a, buf, read, now)
	} else {
		err = s.copy(&a, buf, read)
	}
	if err != nil {
		return false, err
	}
	return s.place(a)
}

// copy answers with a page of the clone's own, or zeros, which cost it nothing
// until it writes there.
func (s *session) copy(a *answer, buf []byte, read reader) error {
	if s.pageSize > window {
		if s.huge == nil {
			s.huge = make([]byte, s.pageSize)
		}
		buf = s.huge
	}
	page := buf[:s.pageSize]
	if err := read(page, a.off); err != nil {
		return err
	}
	if !isZero(page) {
		a.data = page
	}
	return nil
}

// share fills the template around the page, also for a write: under KVM a guest's
// read that has to wait comes as one (async page faults, FOLL_WRITE), so that
// clones would share nothing otherwise. A write then gets a page of its own at
// once, and a read what the template has.
func (s *session) share(a *answer, buf []byte, read reader, now bool) error {
	data, state, err := s.server.template.need(a.off, buf, read, now)
	switch {
	case err != nil && data != nil:
		// The template cannot grow (tmpfs or memory is full): the clone goes on with
		// a page of its own, as long as it gets one.
		s.server.warnOnce("template cannot be filled; clones get pages of their own", err)
		a.data = data
	case err != nil:
		return err
	case state == pageZero:
	case a.write && data != nil:
		a.data = data
	case s.wokenBefore(a.addr):
		return s.copy(a, buf, read)
	default:
		a.wake = true
	}
	return nil
}

// wokenBefore tells whether the fault was answered by waking lately, and notes it.
func (s *session) wokenBefore(addr uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.woken[:], addr) {
		return true
	}
	s.woken[s.wokenNext] = addr
	s.wokenNext = (s.wokenNext + 1) % len(s.woken)
	return false
}

// place gives the kernel the answer.
func (s *session) place(a answer) (again bool, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isRemoved(a.off) { // also while it was read
		a.data, a.wake = nil, false
	}
	var err error
	var copied, zeroed int64
	switch {
	case a.wake:
		err = s.fd.Wake(a.addr, s.pageSize)
	case a.data != nil:
		copied, err = s.fd.Copy(a.addr, a.data)
	case a.write || s.pageSize != pageSize:
		// A write to the zero page would fault again, to be copied from it. Huge
		// pages have no zero page.
		copied, err = s.fd.Copy(a.addr, zeros[:s.pageSize])
	default:
		zeroed, err = s.fd.ZeroPage(a.addr, s.pageSize)
	}
	switch {
	case err == nil:
	case errors.Is(err, uffd.ErrAgain):
		return true, nil
	case errors.Is(err, uffd.ErrExist), errors.Is(err, uffd.ErrNotRegistered):
		// Somebody else was faster, or the mapping is gone: either way the thread
		// that waits has to look again.
		if err := s.fd.Wake(a.addr, s.pageSize); err != nil {
			return false, ended(err)
		}
	default:
		return false, ended(err)
	}
	s.stats.Faults++
	if a.write {
		s.stats.WriteFaults++
	}
	if a.wake {
		s.stats.Woken++
	}
	s.stats.CopiedBytes += uint64(copied)
	s.stats.ZeroBytes += uint64(zeroed)
	return false, nil
}

// ended tells the end of a VMM from a failure.
func ended(err error) error {
	if errors.Is(err, uffd.ErrGone) || errors.Is(err, uffd.ErrClosed) {
		return errOver
	}
	return fmt.Errorf("answer fault: %w", err)
}

func closeFD(fd int) error { return unix.Close(fd) }
