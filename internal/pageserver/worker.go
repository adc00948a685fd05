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
// are as many as processors. The first one waits for events; what is more than one
// turn of one session, it leaves to the others. So a fault that comes alone wakes one
// thread, as it does in the simplest page server, and a storm keeps nobody from being heard.
type worker struct {
	server *Server
	batch  [quantum]fault
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

// backlog are sessions that wait for their turn. It has room for as many as are served
// with any sense; who finds it full does the work itself.
type backlog chan *session

func newBacklog() backlog { return make(backlog, 4096) }

// add is false when the backlog is full.
func (b backlog) add(s *session) bool {
	select {
	case b <- s:
		return true
	default:
		return false
	}
}

// help gives sessions of the backlog their turns, until done.
func (w *worker) help(b backlog, done <-chan struct{}) {
	blocked := 0 // turns in a row in which the kernel took nothing
	for {
		var s *session
		select {
		case s = <-b:
		case <-done:
			return
		}
		o := s.turn(w)
		if o == turnOver && s.release() {
			blocked = 0
			continue
		}
		if o != turnBlocked {
			blocked = 0
		} else {
			blocked++
			// Asked for once: others add and take meanwhile.
			if others := len(b); blocked > others {
				w.pause(blocked - others)
			}
		}
		if !b.add(s) {
			w.finish(s)
		}
	}
}

// finish gives a session all the turns that it needs.
func (w *worker) finish(s *session) {
	for blocked := 0; ; {
		switch o := s.turn(w); {
		case o == turnOver && s.release():
			return
		case o == turnBlocked:
			blocked++
			w.pause(blocked)
		default:
			blocked = 0
		}
	}
}

// pause waits until the kernel may take answers again. Nothing tells when it is done
// with removing: it is some microseconds after the event was read.
func (w *worker) pause(times int) {
	time.Sleep(min(20*time.Microsecond<<min(times-1, 6), time.Millisecond))
}

// lead waits for events until the poller is stopped. Alone, it does all the work.
func (w *worker) lead(b backlog, alone bool) error {
	var keys uffd.Keys
	var poll polling
	for {
		ready, err := poll.wait(w.server.poller, &keys, alone && len(b) > 0)
		if errors.Is(err, uffd.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		first := true
		for _, k := range ready {
			s := w.server.byKey(k)
			if s == nil || !s.claim() {
				continue
			}
			if first {
				first = false
				if s.turn(w) == turnOver && s.release() {
					continue
				}
			}
			if !b.add(s) {
				w.finish(s)
			}
		}
		if alone {
			w.helpOnce(b)
		}
	}
}

// helpOnce gives a turn to each session that is in the backlog now.
func (w *worker) helpOnce(b backlog) {
	blocked, n := 0, len(b)
	for range n {
		s := <-b
		o := s.turn(w)
		if o == turnOver && s.release() {
			continue
		}
		if o == turnBlocked {
			blocked++
		}
		b <- s // there is room: it was taken from there, and nobody else adds
	}
	if n > 0 && blocked == n {
		w.pause(1)
	}
}

// polling before sleeping pays when the next fault is near, as it is for a guest
// that works its way through its memory: to be woken takes longer than to answer.
// So the leader polls for longer when it would have helped last time, and not at all
// after it did not (as KVM's halt polling does).
type polling struct{ time.Duration }

const (
	pollShortest = 4 * time.Microsecond
	pollLongest  = 32 * time.Microsecond
)

// wait returns the sessions that have events; with now perhaps none.
func (d *polling) wait(p *uffd.Poller, keys *uffd.Keys, now bool) ([]int32, error) {
	if now {
		return p.Wait(keys, 0)
	}
	begun := time.Now()
	for d.Duration > 0 && time.Since(begun) < d.Duration {
		if ready, err := p.Wait(keys, 0); err != nil || len(ready) > 0 {
			return ready, err
		}
	}
	ready, err := p.Wait(keys, -1)
	if time.Since(begun) > pollLongest {
		d.Duration = 0
	} else {
		d.Duration = min(max(pollShortest, 2*d.Duration), pollLongest)
	}
	return ready, err
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
