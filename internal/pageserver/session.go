//go:build linux

package pageserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sort"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// session serves one clone, until its VMM has ended. It has a thread of its own
// (attend.go); a fault that has to wait for the disk is answered elsewhere (slow.go),
// so that a REMOVE, for which a thread of the VMM waits, never waits behind a read.
type session struct {
	server *Server
	id     string // of its [Guest]
	fd     *uffd.FD
	conn   *net.UnixConn // of the handshake, kept open as VMMs may watch it; or nil
	vmm    *process
	// regions by ascending address; their pages are all of one size.
	regions  []Mapping
	pageSize uint64
	started  time.Time
	// cold tells that nothing was replayed for the session; counted whether it
	// tells something about the working set, see record.go.
	cold, counted bool

	attendant attendant

	// over is closed when the session is to end.
	over chan struct{}
	once sync.Once

	// mu guards what follows. It is held over reading events and noting what they
	// removed, and over looking that up and placing a page: else a page that was
	// read before the REMOVE could be placed after it (TestRemoveDuringRead).
	mu      sync.Mutex
	closing bool
	ledger  *ledger
	events  *uffd.Buffer
	// queue are faults that wait for their turn, slow those that wait for the disk.
	queue, slow []fault
	counters    counters
	// recording tells that faults belong to the working set.
	recording bool
	recorded  uint64
	// recordEnd ends that.
	recordEnd *time.Timer
	// present are huge pages, see hugeIsThere; nil without any.
	present map[uint64]int
	// woken are the faults that were last answered by waking alone, and returned
	// how many such came back; see unmapped.
	woken     [64]uint64
	wokenNext int
	returned  int
}

// fault waits for its answer.
type fault struct {
	addr  uint64        // of the page
	off   int64         // of the page in the memory file
	since time.Duration // by clock
	write bool
}

// clock tells the time since the process began: half of what time.Now costs.
func clock() time.Duration { return time.Since(processBegan) }

var processBegan = time.Now()

// errOver ends a session without a failure: the VMM has ended.
var errOver = errors.New("VMM has ended")

var errForked = errors.New("the VMM forked, and the child's memory cannot be served")

// run serves until the VMM has ended or ctx, and then closes what it owns.
func (s *session) run(ctx context.Context) {
	go s.attend()
	var wg sync.WaitGroup
	wg.Go(func() {
		// The userfaultfd does not tell that its process has ended, and the
		// connection's end tells it only of VMMs that keep it (Firecracker since 1.12).
		if s.vmm.waitEnd() {
			s.end(errOver)
		}
	})
	s.mu.Lock()
	s.recordEnd = time.AfterFunc(recordFor, s.endRecording)
	s.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-s.over:
	}
	s.endRecording()
	s.dismiss()
	s.mu.Lock()
	s.closing = true
	s.recordEnd.Stop()
	s.ledger.save(&s.counters)
	s.ledger.close()
	s.mu.Unlock()
	freeBuffers([][]byte{s.attendant.buf})
	s.fd.Close()
	s.vmm.close()
	if s.conn != nil {
		s.conn.Close()
	}
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

// drain reads events until none is left. To the end: the kernel hands out faults
// first, and a REMOVE behind them is to be known before they are answered. The caller
// holds mu.
func (s *session) drain() error {
	for {
		events, err := s.fd.ReadEvents(s.events)
		if err != nil {
			return err
		}
		full := s.events.Full()
		if err := s.takeIn(events); err != nil || !full {
			return err
		}
	}
}

// takeIn notes events that are no faults, and queues those that are. The caller holds
// mu.
func (s *session) takeIn(events []uffd.Event) error {
	if len(events) == 0 {
		return nil
	}
	now := clock()
	for _, e := range events {
		var err error
		if e.Type == uffd.EventPageFault {
			err = s.enqueue(e, now)
		} else {
			err = s.note(e)
		}
		if err != nil {
			return err
		}
	}
	s.events.Clear()
	return nil
}

func (s *session) enqueue(e uffd.Event, now time.Duration) error {
	addr := e.Address &^ (s.pageSize - 1)
	r, ok := s.region(addr)
	if !ok {
		return fmt.Errorf("fault at %#x, which is in no region of the guest's memory", addr)
	}
	f := fault{addr: addr, off: int64(r.Offset + addr - r.Addr), since: now, write: e.Write}
	s.queue = append(s.queue, f)
	if s.recording {
		s.recorded++
		s.server.workingSet.add(f.off / pageSize)
	}
	return nil
}

// note takes in an event that is not a fault. The caller holds mu.
func (s *session) note(e uffd.Event) error {
	switch e.Type {
	case uffd.EventRemove:
		s.remove(e.Address, e.End)
	case uffd.EventUnmap:
		// Nobody will ask for it any more.
	case uffd.EventFork:
		return errors.Join(errForked, unix.Close(e.FD))
	default:
		return fmt.Errorf("the VMM moved its memory (%s at %#x), which cannot be served", e.Type, e.Address)
	}
	return nil
}

// remove notes that [start, end) was given back. The caller holds mu.
func (s *session) remove(start, end uint64) {
	for _, r := range s.regions {
		lo, hi := max(start, r.Addr), min(end, r.Addr+r.Size)
		if lo >= hi {
			continue
		}
		s.counters.RemovedBytes += hi - lo
		s.ledger.remove(int64(r.Offset+lo-r.Addr)/pageSize, int64(hi-lo)/pageSize)
	}
	s.ledger.save(&s.counters)
}

// region finds the one that addr lies in.
func (s *session) region(addr uint64) (Mapping, bool) {
	i := sort.Search(len(s.regions), func(i int) bool { return s.regions[i].Addr+s.regions[i].Size > addr })
	if i == len(s.regions) || addr < s.regions[i].Addr {
		return Mapping{}, false
	}
	return s.regions[i], true
}

// takeOver makes up for what a predecessor that died left undone: it applies the
// events that it had read, and lets the faults that it had read be delivered again.
func (s *session) takeOver() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	left, err := uffd.Left(s.ledger.events())
	if err != nil {
		return err
	}
	for _, e := range left {
		switch e.Type {
		case uffd.EventPageFault:
			continue
		case uffd.EventFork: // its descriptor was the predecessor's
			return errForked
		}
		if err := s.note(e); err != nil {
			return err
		}
	}
	clear(s.ledger.events())
	s.counters.Handovers++
	s.ledger.save(&s.counters)
	for _, r := range s.regions {
		if err := s.fd.Wake(r.Addr, r.Size); err != nil {
			return ended(err)
		}
	}
	return nil
}

func (s *session) stats() SessionStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := SessionStats{PID: s.vmm.pid, Started: s.started, counters: s.counters}
	if !s.closing && s.ledger.any {
		st.RemovedPages = s.ledger.removedPages()
	}
	return st
}

// byAddress sorts faults, and leaves one for each page: a write if one of them is.
func byAddress(fs []fault) []fault {
	slices.SortFunc(fs, func(a, b fault) int { return cmp.Compare(a.addr, b.addr) })
	out := fs[:0]
	for _, f := range fs {
		if n := len(out); n > 0 && out[n-1].addr == f.addr {
			out[n-1].write = out[n-1].write || f.write
			continue
		}
		out = append(out, f)
	}
	return out
}
