//go:build linux

package pageserver

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"fcvm/internal/uffd"
)

// Fill says how the template is filled in the background, so that clones find
// pages there which none of them asked for yet. Under KVM that is what makes them
// share (a read that has to wait arrives as a write there); elsewhere it only
// costs memory.
type Fill struct {
	// BytesPerSecond bounds the reading; 0 turns the filling off.
	BytesPerSecond int64
	// MaxBytes bounds the template; 0 means no bound. It is not filled either
	// when the machine has less than an eighth of its memory available.
	MaxBytes int64
}

// ahead is what is done before anybody asks, by one goroutine: for the template,
// the working set first, then, slowly, all the rest; for each new session, what it
// would wait for. Demand faults go first: between any two steps they get the processor and
// the locks.
type ahead struct {
	server *Server
	buf    []byte
	// huge is where huge pages are read to; nil before the first.
	huge []byte
	// sessions that begin.
	sessions chan *session
	// filled gets a word when the template grew.
	filled  <-chan struct{}
	meminfo *os.File
}

func newAhead(s *Server, buf []byte) *ahead {
	a := &ahead{server: s, buf: buf, sessions: make(chan *session, 1024)}
	if s.template != nil {
		a.filled = s.template.grew
	}
	// Opened now, as later no file can be.
	a.meminfo, _ = os.Open("/proc/meminfo")
	return a
}

func (a *ahead) close() {
	if a.meminfo != nil {
		a.meminfo.Close()
	}
}

// begin replays the working set for a session, in its turn.
func (a *ahead) begin(s *session) {
	if a.server.workingSet.count() == 0 {
		return
	}
	s.attendant.others.Add(1)
	select {
	case a.sessions <- s:
	default: // so many at once get their pages when they ask
		s.attendant.others.Add(-1)
	}
}

func (a *ahead) run(ctx context.Context) {
	if a.server.template != nil {
		a.replayTemplate(ctx)
	}
	fill := a.backgroundFill()
	var tick, drop <-chan time.Time
	if fill != nil {
		t := time.NewTicker(fillEvery)
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-a.sessions:
			a.replaySession(ctx, s)
		case <-tick:
			if !fill(ctx) {
				tick = nil
			}
		case <-a.filled:
			if drop == nil {
				drop = time.After(dropAfter)
			}
		case <-drop:
			drop = nil
			a.server.template.dropSource()
		}
	}
}

// dropAfter is how long the page cache may hold what the template has, too.
const dropAfter = 100 * time.Millisecond

// replayTemplate fills the windows of the working set.
func (a *ahead) replayTemplate(ctx context.Context) {
	s := a.server
	pages := s.source.size / pageSize
	for next := int64(0); ctx.Err() == nil; {
		page, n := s.workingSet.pages.run(next, pages, 1)
		if n == 0 {
			return
		}
		start := page * pageSize / window * window
		next = (start + window) / pageSize
		begun := time.Now()
		made, err := s.template.fillAhead(start, a.buf, s.source.read)
		if err != nil {
			// Who asks for the page meets it again, and then it counts.
			s.config.Log.Warn("filling ahead failed", "offset", start, "error", err)
			continue
		}
		if made > 0 {
			s.replay.add(time.Since(begun), 1)
			s.replayed.Add(made)
		}
		// A session does not wait for the whole of it.
		select {
		case ses := <-a.sessions:
			a.replaySession(ctx, ses)
		default:
		}
	}
}

// replaySession places what the clone would wait for: with policy copy all pages
// of the working set, else those that are zeros, which no template gives it.
func (a *ahead) replaySession(ctx context.Context, ses *session) {
	defer ses.attendant.others.Add(-1)
	replay := a.replayRegion
	if ses.pageSize != pageSize {
		replay = a.replayHuge
	}
	for _, r := range ses.regions {
		err := replay(ctx, ses, r)
		if err == nil {
			continue
		}
		if !errors.Is(err, errOver) {
			a.server.config.Log.Warn("replaying the working set failed", "pid", ses.vmm.pid, "error", err)
		}
		return
	}
}

func (a *ahead) replayRegion(ctx context.Context, ses *session, r Mapping) error {
	set := a.server.workingSet.pages
	first, end := int64(r.Offset)/pageSize, int64(r.Offset+r.Size)/pageSize
	zeroed := int64(-1)
	for next := first; ctx.Err() == nil; {
		page, n := set.run(next, end, quantum)
		if n == 0 {
			break
		}
		var err error
		if zero := a.server.source.zero; zero.has(page) {
			if block := page / zeroBlock; block != zeroed {
				zeroed = block
				for p, n := range zerosAround(page, first, end, zero.has) {
					err = errors.Join(err, ses.placeAhead(r.Addr+uint64(p-first)*pageSize, p, n, nil))
				}
			}
			n = 1
		} else {
			for i := range n {
				if zero.has(page + i) {
					n = i
					break
				}
			}
			err = a.replayRun(ses, r.Addr+uint64(page-first)*pageSize, page, n)
		}
		if err != nil {
			return err
		}
		next = page + n
	}
	return nil
}

// replayHuge places the huge pages of which the working set has a part.
func (a *ahead) replayHuge(ctx context.Context, ses *session, r Mapping) error {
	const n = hugePageSize / pageSize
	first, end := int64(r.Offset)/pageSize, int64(r.Offset+r.Size)/pageSize
	for next := first; ctx.Err() == nil; {
		page, found := a.server.workingSet.pages.run(next, end, 1)
		if found == 0 {
			break
		}
		page -= (page - first) % n
		if err := a.replayRun(ses, r.Addr+uint64(page-first)*pageSize, page, n); err != nil {
			return err
		}
		next = page + n
	}
	return nil
}

// replayRun places n neighbours, unless the clone has them from the template.
func (a *ahead) replayRun(ses *session, addr uint64, page, n int64) error {
	if a.server.template != nil {
		return nil
	}
	begun := time.Now()
	data := a.room(n * pageSize)
	if err := a.server.source.read(data, page*pageSize); err != nil {
		return err
	}
	if err := ses.placeAhead(addr, page, n, data); err != nil {
		return err
	}
	a.server.replay.add(time.Since(begun), 1)
	return nil
}

// room is so much to read to.
func (a *ahead) room(size int64) []byte {
	if size <= int64(len(a.buf)) {
		return a.buf[:size]
	}
	if a.huge == nil {
		a.huge = make([]byte, hugePageSize)
	}
	return a.huge[:size]
}

// placeAhead places pages that nobody waits for yet: data, or zeros. What is there
// already stays, and what the guest gave back meanwhile is left to it.
func (s *session) placeAhead(addr uint64, page, n int64, data []byte) error {
	for tries := 0; n > 0 && tries < 100; {
		placed, err := s.tryPlaceAhead(addr, page, n, data)
		switch {
		case errors.Is(err, uffd.ErrAgain) && placed == 0:
			tries++ // it is busy giving memory back
			time.Sleep(50 * time.Microsecond)
			continue
		case err == nil, placed > 0:
		case errors.Is(err, uffd.ErrExist), errors.Is(err, uffd.ErrNotRegistered), errors.Is(err, errSlow):
			placed = int64(s.pageSize) / pageSize // is there, or not to be touched
		default:
			return ended(err)
		}
		addr, page, n = addr+uint64(placed)*pageSize, page+placed, n-placed
		if data != nil {
			data = data[placed*pageSize:]
		}
	}
	return nil
}

func (s *session) tryPlaceAhead(addr uint64, page, n int64, data []byte) (placed int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return 0, errOver
	}
	keep := int64(0)
	for keep < n && !s.ledger.removed(page+keep) {
		keep++
	}
	if keep == 0 {
		return 0, errSlow
	}
	if data != nil {
		data = data[:keep*pageSize]
	}
	bytes, err := s.put(addr, uint64(keep)*pageSize, data, false)
	s.counters.ReplayedBytes += uint64(bytes)
	s.ledger.save(&s.counters)
	return bytes / pageSize, err
}

// fillEvery is how often a part of the template is filled in the background.
const fillEvery = 10 * time.Millisecond

// backgroundFill returns what fills a part of the template, and says whether there
// is more to fill; nil when it is not wanted.
func (a *ahead) backgroundFill() func(context.Context) bool {
	s, f := a.server, a.server.config.Fill
	if s.template == nil || f.BytesPerSecond <= 0 {
		return nil
	}
	next, credit, ticks, short := int64(0), int64(0), 0, false
	perTick := max(window, f.BytesPerSecond*int64(fillEvery)/int64(time.Second))
	return func(ctx context.Context) bool {
		if ticks%100 == 0 {
			short = a.memoryIsShort()
		}
		if ticks++; short {
			return true // perhaps later
		}
		// What a pause left over is not made up for. One window a tick is filled
		// however busy the clones are.
		for credit = min(credit, 0) + perTick; credit > 0; credit -= window {
			if next >= s.source.size || f.MaxBytes > 0 && s.template.bytes.Load() >= f.MaxBytes {
				return false
			}
			begun := time.Now()
			made, err := s.template.fillAhead(next, a.buf, s.source.readDirect)
			if err != nil {
				s.config.Log.Warn("filling the template in the background ends", "offset", next, "error", err)
				return false
			}
			next += window
			if made == 0 {
				credit += window // nothing was read
				continue
			}
			s.background.add(time.Since(begun), 1)
			s.backgrounded.Add(made)
			if ctx.Err() != nil || len(a.sessions) > 0 || s.busy() {
				return true
			}
		}
		return true
	}
}

// busy tells whether a clone waited for a page in the last moment.
func (s *Server) busy() bool {
	n := s.demand.count()
	return s.lastDemand.Swap(n) != n
}

// memoryIsShort tells whether less than an eighth of the machine's memory is
// available (proc_meminfo(5)).
func (a *ahead) memoryIsShort() bool {
	if a.meminfo == nil {
		return false
	}
	buf := make([]byte, 512) // MemTotal and MemAvailable are in the first lines
	n, _ := a.meminfo.ReadAt(buf, 0)
	total, available := int64(0), int64(-1)
	for line := range strings.Lines(string(buf[:n])) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			total = kib
		case "MemAvailable:":
			available = kib
		}
	}
	return available >= 0 && available < total/8
}
