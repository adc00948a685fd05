//go:build linux

package pageserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sort"
	"sync"
	"time"

	"fcvm/internal/uffd"
)

// session serves one clone, from its handshake until its VMM has ended. One
// goroutine reads events, another answers faults, so that a REMOVE, for which a
// thread of the VMM waits, never waits behind a slow read of the memory file.
type session struct {
	server *Server
	fd     *uffd.FD
	conn   *net.UnixConn // kept open: VMMs may watch it
	vmm    *process
	// regions by ascending address; their pages are all of one size.
	regions  []Mapping
	pageSize uint64

	// huge is where a huge page is read to; answerFaults's own.
	huge []byte

	// over is closed when the session is to end.
	over chan struct{}
	once sync.Once

	// mu guards what follows. It is held over reading events and noting what they
	// removed, and over looking that up and placing a page: else a page that was
	// read before the REMOVE could be placed after it (TestRemoveDuringRead).
	mu      sync.Mutex
	work    sync.Cond
	closing bool
	queue   []fault
	// parked are faults that the kernel did not let be answered for now.
	parked []fault
	// removed has the pages, by their place in the memory file, that the guest gave
	// back: they are zeros from then on. It is nil before the first.
	removed bitmap
	// woken are the faults that were last answered by waking alone. One that comes
	// back was not helped by the template, so its VMM does not map it: it gets a copy.
	woken     [16]uint64
	wokenNext int
	stats     SessionStats
}

// fault waits for its answer.
type fault struct {
	addr  uint64 // of the page
	write bool
}

// errOver ends a session without a failure: the VMM has ended.
var errOver = errors.New("VMM has ended")

// run serves until the VMM has ended or ctx, and then closes what it owns.
func (s *session) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(s.readEvents)
	wg.Go(s.answerFaults)
	wg.Go(func() {
		// The userfaultfd does not tell that its process has ended, and the
		// connection's end tells it only of VMMs that keep it (Firecracker since 1.12).
		if s.vmm.waitEnd() {
			s.end(errOver)
		}
	})
	select {
	case <-ctx.Done():
	case <-s.over:
	}
	s.mu.Lock()
	s.closing = true
	s.work.Broadcast()
	s.mu.Unlock()
	s.fd.Close()
	s.vmm.close()
	s.conn.Close()
	wg.Wait()
}

// end ends the session. An err other than errOver is a fault that cannot be
// answered, for which the VMM is killed: without its memory it must not run on.
func (s *session) end(err error) {
	s.once.Do(func() {
		if !errors.Is(err, errOver) && !errors.Is(err, uffd.ErrClosed) {
			s.server.fail(s.vmm, err)
		}
		close(s.over)
	})
}

// readEvents notes what was removed, and answers the faults that need no
// waiting; the others it queues.
func (s *session) readEvents() {
	var buf uffd.Buffer
	var faults []fault
	var failed error
	err := s.fd.WaitReadable(func() (more bool) {
		for {
			faults, failed = s.drain(&buf, faults[:0])
			for _, f := range faults {
				if failed == nil {
					failed = s.answerNow(f)
				}
			}
			if failed != nil {
				return false
			}
			if len(faults) == 0 {
				return true
			}
		}
	})
	if err = errors.Join(failed, err); err != nil {
		s.end(err)
	}
}

// drain reads events until none is left, notes those that are no faults, and
// appends those that are. To the end: the kernel hands out faults first, and a
// REMOVE behind them is to be known before they are answered.
func (s *session) drain(buf *uffd.Buffer, faults []fault) ([]fault, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		events, err := s.fd.ReadEvents(buf)
		if err != nil || len(events) == 0 {
			return faults, err
		}
		for _, e := range events {
			if e.Type == uffd.EventPageFault {
				faults = append(faults, fault{e.Address &^ (s.pageSize - 1), e.Write})
			} else if err := s.note(e); err != nil {
				return faults, err
			}
		}
	}
}

// note takes in an event that is not a fault. The caller holds mu.
func (s *session) note(e uffd.Event) error {
	switch e.Type {
	case uffd.EventRemove:
		s.remove(e.Address, e.End)
	case uffd.EventUnmap:
		// Nobody will ask for it any more.
	case uffd.EventFork:
		return errors.Join(errors.New("the VMM forked, and the child's memory cannot be served"), closeFD(e.FD))
	default:
		return fmt.Errorf("the VMM moved its memory (%s at %#x), which cannot be served", e.Type, e.Address)
	}
	return nil
}

// remove notes that [start, end) was given back. The caller holds mu.
func (s *session) remove(start, end uint64) {
	if s.removed == nil {
		s.removed = newBitmap(s.server.source.size / pageSize)
	}
	for _, r := range s.regions {
		lo, hi := max(start, r.Addr), min(end, r.Addr+r.Size)
		if lo >= hi {
			continue
		}
		s.stats.RemovedBytes += hi - lo
		first := int64(r.Offset+lo-r.Addr) / pageSize
		for p := range int64(hi-lo) / pageSize {
			s.removed.set(first + p)
		}
	}
}

// isRemoved tells it of the page at off in the memory file. The caller holds mu.
func (s *session) isRemoved(off int64) bool {
	return s.removed != nil && s.removed.has(off/pageSize)
}

// region finds the one that addr lies in.
func (s *session) region(addr uint64) (Mapping, bool) {
	i := sort.Search(len(s.regions), func(i int) bool { return s.regions[i].Addr+s.regions[i].Size > addr })
	if i == len(s.regions) || addr < s.regions[i].Addr {
		return Mapping{}, false
	}
	return s.regions[i], true
}

// next waits for a fault to answer; false ends it.
func (s *session) next(retryIn time.Duration) (fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) == 0 && !s.closing {
		if len(s.parked) == 0 {
			s.work.Wait()
			continue
		}
		// Nothing tells when the kernel is done with removing: it is some
		// microseconds after the event was read.
		s.mu.Unlock()
		time.Sleep(retryIn)
		s.mu.Lock()
		s.queue, s.parked = append(s.queue, s.parked...), s.parked[:0]
	}
	if s.closing {
		return fault{}, false
	}
	f := s.queue[0]
	if s.queue = s.queue[1:]; len(s.queue) == 0 {
		s.queue = nil
	}
	return f, true
}

func (s *session) snapshot() SessionStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}
