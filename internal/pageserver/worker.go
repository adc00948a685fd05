//go:build linux

package pageserver

import (
	"errors"
	"time"

	"fcvm/internal/uffd"
)

// quantum is how many faults of one clone are answered before another's turn: one
// that is in a fault storm does not starve the others. It is also the most that one
// ioctl answers.
const quantum = 16

// worker answers faults of all sessions, one turn of one session at a time. There
// are as many as processors.
type worker struct {
	server *Server
	keys   uffd.Keys
	// turns are the sessions that are this worker's for now, in the order in which
	// they get their turn.
	turns []*session
	batch [quantum]fault
	// poll is how long the worker looks for events before it sleeps, see wait.
	poll time.Duration
	// buf is where pages are read to; see buffers.
	buf []byte
}

// outcome of a turn.
type outcome int

const (
	// turnOver: nothing is left to do.
	turnOver outcome = iota
	// turnMore: there are more faults than a turn has.
	turnMore
	// turnBlocked: the kernel takes no answer for now.
	turnBlocked
)

// work answers faults until the poller is stopped.
func (w *worker) work() error {
	const shortest, longest = 20 * time.Microsecond, time.Millisecond
	pause := shortest
	for {
		keys, err := w.wait()
		if errors.Is(err, uffd.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, k := range keys {
			if s := w.server.byKey(k); s != nil && s.claim() {
				w.turns = append(w.turns, s)
			}
		}
		blocked := len(w.turns) > 0
		kept := w.turns[:0]
		for _, s := range w.turns {
			o := s.turn(w)
			blocked = blocked && o == turnBlocked
			if o != turnOver || !s.release() {
				kept = append(kept, s)
			}
		}
		clear(w.turns[len(kept):])
		w.turns = kept
		if !blocked {
			pause = shortest
			continue
		}
		// Nothing tells when the kernel is done with removing: it is some
		// microseconds after the event was read.
		time.Sleep(pause)
		pause = min(2*pause, longest)
	}
}

// Polling before sleeping pays when the next fault is near, as it is for a guest
// that works its way through its memory: to be woken takes longer than to answer.
// So a worker polls for longer when it would have helped last time, and not at all after it
// did not (as KVM's halt polling does). Measured (make bench-pages): p50 of a fault
// 4.6 µs instead of 9.5.
const (
	pollShortest = 4 * time.Microsecond
	pollLongest  = 32 * time.Microsecond
)

// wait returns the sessions that have events; none, at once, when others wait for
// their turn.
func (w *worker) wait() ([]int32, error) {
	p := w.server.poller
	if len(w.turns) > 0 {
		return p.Wait(&w.keys, 0)
	}
	begun := time.Now()
	for w.poll > 0 && time.Since(begun) < w.poll {
		if keys, err := p.Wait(&w.keys, 0); err != nil || len(keys) > 0 {
			return keys, err
		}
	}
	keys, err := p.Wait(&w.keys, -1)
	if time.Since(begun) > pollLongest {
		w.poll = 0
	} else {
		w.poll = min(max(pollShortest, 2*w.poll), pollLongest)
	}
	return keys, err
}

// A session belongs to one worker at a time. One that is told of an event of a
// session that another has leaves it a word.
const (
	sessionFree int32 = iota
	sessionTaken
	sessionTakenAgain
)

// claim makes the session this worker's, unless it is another's.
func (s *session) claim() bool {
	for {
		switch {
		case s.owner.CompareAndSwap(sessionFree, sessionTaken):
			return true
		case s.owner.CompareAndSwap(sessionTaken, sessionTakenAgain), s.owner.Load() == sessionTakenAgain:
			return false
		}
	}
}

// release gives the session up, unless there was a word that it has new events.
func (s *session) release() bool {
	if s.owner.CompareAndSwap(sessionTaken, sessionFree) {
		return true
	}
	s.owner.Store(sessionTaken)
	return false
}
