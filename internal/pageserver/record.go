//go:build linux

package pageserver

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"fcvm/internal/workingset"
)

const (
	// recordFor is how long after its start a session's faults go into the working
	// set: from the load until the clone is ready, and a while on. It takes 0.1 s
	// to be ready under TCG, and the first requests come then.
	recordFor = 5 * time.Second
	// recordSessions is how many clones of a snapshot are recorded, ever. What they
	// did not need, few others will.
	recordSessions = 16
)

// workingSet is the working set in use: replayed for new sessions, and recorded to.
type workingSet struct {
	mu   sync.Mutex
	set  *workingset.Set // guarded by mu
	file *os.File        // nil when nothing is kept
	log  func(msg string, err error)

	// pages are those of set and those that were recorded since.
	pages bitmap
	// loaded tells that there was a set when the server started.
	loaded bool
	record bool
	once   sync.Once
}

// openWorkingSet reads the set at path, which may be missing, or no set at all:
// then it is recorded anew. An empty path keeps nothing.
func openWorkingSet(path string, id workingset.ID, pages int64, log func(string, error)) (*workingSet, error) {
	w := &workingSet{set: workingset.New(id, pages), pages: newBitmap(pages), log: log}
	if path == "" {
		return w, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		// Somebody else's snapshot can be read, if it is there, and not recorded to.
		if f, err = os.Open(path); err != nil {
			log("no working set is kept", err)
			return w, nil
		}
	} else {
		w.record = true
	}
	w.file = f
	raw, err := io.ReadAll(io.LimitReader(f, int64(workingset.FileSize(pages))+1))
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("read working set: %w", err)
	}
	set, err := workingset.Parse(raw, id, pages)
	switch {
	case err == nil:
		w.set = set
		for p := range set.All() {
			w.pages.set(p)
		}
		w.loaded = set.Count() > 0
		w.record = w.record && set.Cold.Sessions+set.Warm.Sessions < recordSessions
	case len(raw) > 0:
		log("working set is recorded anew", err)
	}
	return w, nil
}

func (w *workingSet) close() {
	if w.file != nil {
		w.file.Close()
	}
}

// add notes a page that a clone had to wait for.
func (w *workingSet) add(page int64) {
	if !w.pages.has(page) {
		w.pages.set(page)
	}
}

// count returns how many pages are replayed.
func (w *workingSet) count() int64 { return w.pages.count() }

// finish adds what a session was recorded to have waited for, and stores the set in
// place. It is written without care: a torn one is refused when it is read.
func (w *workingSet) finish(cold, counted bool, faults uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for p := range w.set.Pages() {
		if w.pages.has(p) {
			w.set.Add(p)
		}
	}
	if counted {
		tally := &w.set.Warm
		if cold {
			tally = &w.set.Cold
		}
		tally.Sessions++
		tally.Faults += faults
	}
	raw := w.set.Encode()
	_, err := w.file.WriteAt(raw, 0)
	if err == nil {
		err = w.file.Truncate(int64(len(raw)))
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		w.once.Do(func() { w.log("working set cannot be stored", err) })
	}
}

// beginRecording decides what a new session tells of the working set. The first
// one of a template that was empty, or any that gets copies, tells what clones
// wait for without one (cold), and with it. Those that find a template which
// others filled tell neither.
func (s *Server) beginRecording(ses *session) {
	w := s.workingSet
	first := !s.anySession.Swap(true)
	ses.cold = w.count() == 0
	ses.counted = s.template == nil || first && !s.config.TemplateUsed
	ses.recording = w.record
}

// record begins the recording of a session anew, or drops what was recorded of it:
// the guest of a VMM that was started ahead runs later, or never.
func (s *session) record(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recorded = 0
	s.recording = on && s.server.workingSet.record && !s.closing
	if s.recording && s.recordEnd != nil {
		s.recordEnd.Reset(recordFor)
	}
}

// endRecording is called after [recordFor], or when the session ends.
func (s *session) endRecording() {
	s.mu.Lock()
	was, faults := s.recording, s.recorded
	s.recording = false
	s.mu.Unlock()
	if was {
		s.server.workingSet.finish(s.cold, s.counted, faults)
	}
}
