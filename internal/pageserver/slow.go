//go:build linux

package pageserver

import (
	"sync"
	"time"
)

const (
	// slowReaders answer faults that wait for the disk: as many reads are under way
	// at a time.
	slowReaders = 4
	// readAhead is read for such a fault: what is around it is asked for next, more
	// often than not. It is what the kernel reads ahead by default.
	readAhead = 128 << 10
)

// slowQueue has the sessions with faults that wait for the disk. Each gets one
// answered in its turn.
type slowQueue struct {
	mu       sync.Mutex
	cond     sync.Cond
	sessions []*session // guarded by mu
	closed   bool       // guarded by mu
	// huge is where a huge page is read to, under hugeMu.
	hugeMu sync.Mutex
	huge   []byte
}

func (q *slowQueue) init() { q.cond.L = &q.mu }

// add puts a session in, unless it is.
func (q *slowQueue) add(s *session) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, other := range q.sessions {
		if other == s {
			return
		}
	}
	q.sessions = append(q.sessions, s)
	q.cond.Signal()
}

// next waits for a session; nil ends it.
func (q *slowQueue) next() *session {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.sessions) == 0 && !q.closed {
		q.cond.Wait()
	}
	if q.closed {
		return nil
	}
	s := q.sessions[0]
	q.sessions = q.sessions[:copy(q.sessions, q.sessions[1:])]
	return s
}

func (q *slowQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.cond.Broadcast()
}

// answerSlow answers faults that wait for the disk, until the queue is closed.
func (s *Server) answerSlow(buf []byte) {
	for {
		ses := s.slow.next()
		if ses == nil {
			return
		}
		if f, ok := ses.nextSlow(); ok {
			if err := ses.answerSlow(f, buf); err != nil {
				ses.end(err)
			}
			ses.attendant.others.Add(-1)
		}
	}
}

// nextSlow takes a fault, and puts the session back into the queue where it has more.
func (s *session) nextSlow() (fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || len(s.slow) == 0 {
		return fault{}, false
	}
	f := s.slow[0]
	s.slow = s.slow[:copy(s.slow, s.slow[1:])]
	if len(s.slow) > 0 {
		s.server.slow.add(s)
	}
	return f, true
}

// answerSlow reads without the session's lock, and answers with it.
func (s *session) answerSlow(f fault, buf []byte) error {
	src := s.server.source
	src.willNeed(f.off/readAhead*readAhead, readAhead)
	if t := s.server.template; t != nil && !t.known(f.off/pageSize) {
		// Once it is filled, the fault is like any other.
		data, err := t.need(f.off, buf, false)
		if err != nil && data == nil {
			return err
		}
		return s.settle(f, data)
	}
	page := buf[:pageSize]
	if s.pageSize > pageSize {
		s.server.slow.hugeMu.Lock()
		defer s.server.slow.hugeMu.Unlock()
		if s.server.slow.huge == nil {
			s.server.slow.huge = make([]byte, s.pageSize)
		}
		page = s.server.slow.huge
	}
	if err := src.read(page, f.off); err != nil {
		return err
	}
	return s.settle(f, page)
}

// settle answers a fault whose page was read, and perhaps given back meanwhile. It
// waits as long as the kernel takes no answer.
func (s *session) settle(f fault, data []byte) error {
	const shortest, longest = 20 * time.Microsecond, time.Millisecond
	for pause := shortest; ; pause = min(2*pause, longest) {
		over, err := s.trySettle(f, data)
		if over || err != nil {
			return err
		}
		time.Sleep(pause)
	}
}

func (s *session) trySettle(f fault, data []byte) (over bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return true, nil
	}
	// What is parked goes behind what is there, and is taken away again: this
	// goroutine tries it anew, because the thread may have no reason to.
	waiting, fs := len(s.queue), []fault{f}
	switch k := s.kind(f); {
	case k == kindZero:
		err = s.place(fs, nil)
	case k == kindWake && (data == nil || !f.write):
		err = s.wake(fs)
	case data == nil:
		err = s.wake(fs)
	default:
		err = s.placeContent(fs, data)
	}
	over = len(s.queue) == waiting
	s.queue = s.queue[:waiting]
	if over {
		s.counters.Slow++
		s.ledger.save(&s.counters)
	}
	return over, err
}
