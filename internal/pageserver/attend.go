//go:build linux

package pageserver

import (
	"errors"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// quantum is how many faults of one clone are answered before its events are looked
// at again. It is also the most that one ioctl answers.
const quantum = 16

// attendant is a session's thread, which waits for the clone's events and answers its
// faults. Each session has one, as in the simplest page server: the kernel wakes it on
// the processor on which a vCPU has just gone to sleep, and shares the processors
// fairly among the clones. Measured against as many workers as processors for all
// sessions (make bench-pages, random order, 2 processors that others used as well): 8
// clones at once took 1.0 to 1.2 times as long as with a C loop instead of 3.8 to 4.4, one clone
// 1.3 times instead of 1.3 to 2.0. Polling for a while before sleeping made the latter 4 to 6, as
// the thread keeps its processor from the vCPU. Nor is it faster to have threads for several
// sessions that wait in epoll_wait(2): in C, two for four each took 1.2 to 1.4 times as long as a
// thread for each.
//
// Mostly it is the only one that places pages of its session, and then waits in
// read(2) itself. As long as others do, too (ahead.go, slow.go), it must not: a REMOVE that was
// read has to be noted before anything else is placed, for which both read and note
// under the session's lock, and not wait there. So it waits in poll(2) then.
type attendant struct {
	tid atomic.Int64
	// others counts those that place pages besides the thread. Only the thread itself adds to
	// it, once it runs.
	others atomic.Int32
	// closing tells the thread to end; done is closed when it has.
	closing atomic.Bool
	done    chan struct{}
	// blocking is whether the userfaultfd waits in read(2).
	blocking bool
	// alone counts reads in a row that found one event; see most.
	alone int
	batch [quantum]fault
	// buf is where pages are read to that only this clone gets.
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

// attend answers faults until the session is closing, or nothing more can be.
func (s *session) attend() {
	// Whoever dismisses it needs to know the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	a := &s.attendant
	defer close(a.done)
	a.tid.Store(int64(unix.Gettid()))
	hurry()
	o, blocked := turnOver, 0
	for !a.closing.Load() {
		var events []uffd.Event
		var err error
		switch alone := a.others.Load() == 0; {
		case o == turnBlocked:
			// Nothing tells when the kernel is done with removing: it is some
			// microseconds after the event was read.
			pause := unix.NsecToTimespec(int64(min(20*time.Microsecond<<min(blocked, 6), time.Millisecond)))
			_ = unix.Nanosleep(&pause, nil)
			blocked++
			err = s.block(false)
		case o == turnMore || !alone:
			blocked = 0
			if err = s.block(false); err == nil && o == turnOver {
				_, err = s.fd.Poll()
			}
		default:
			blocked = 0
			if err = s.block(true); err == nil && !a.closing.Load() {
				events, err = s.fd.WaitEvents(s.events, a.most())
				a.met(len(events))
			}
		}
		if err == nil {
			o, err = s.turn(events)
		}
		if err != nil {
			s.end(err)
			return
		}
	}
}

// most is how many events are read at once: one, as long as they come one by one, for which
// the kernel takes 0.4 µs less, and many now and then to see whether they still do. It
// is no matter that an event may wait behind: while one that changes the memory does, the
// kernel places no page (EAGAIN), and then all are read.
func (a *attendant) most() int {
	if a.alone%8 == 0 {
		return uffd.MaxEvents
	}
	return 1
}

// met notes how many events were read.
func (a *attendant) met(n int) {
	if n == 1 {
		a.alone++
	} else {
		a.alone = 0
	}
}

// slice is what a thread asks for to run at a time: a fault takes some microseconds of it.
const slice = 100 * time.Microsecond

// hurry asks the scheduler to let the thread run soon rather than long, which Linux knows
// since 6.12 (sched_setattr(2), sched_runtime of normal threads), and elsewhere is without
// effect. Measured (make bench-pages, storm): the 99th percentile of clones beside another's
// fault storm rises 1.4 to 2.1 times with it, 1.7 to 2.0 without. Its own short pauses are to be
// short, also where the thread was made by one with a large timer slack (cmd/uffd_handler/monitor.go).
func hurry() {
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(50*time.Microsecond), 0, 0, 0)
	attr, err := unix.SchedGetAttr(0, 0)
	if err == nil && attr.Policy == unix.SCHED_NORMAL {
		attr.Runtime = uint64(slice)
		_ = unix.SchedSetAttr(0, attr, 0)
	}
}

// block lets read(2) wait, or not.
func (s *session) block(wait bool) error {
	if s.attendant.blocking == wait {
		return nil
	}
	s.attendant.blocking = wait
	return s.fd.SetBlocking(wait)
}

// dismiss ends the thread, and returns when it has ended.
func (s *session) dismiss() {
	a := &s.attendant
	a.closing.Store(true)
	for {
		// A signal interrupts poll(2), and read(2) is begun anew, and does not wait. It is
		// the one that Go's runtime interrupts threads with. Repeated, as the thread
		// may be just about to wait.
		_ = s.fd.SetBlocking(false)
		if tid := a.tid.Load(); tid != 0 {
			_ = unix.Tgkill(unix.Getpid(), int(tid), unix.SIGURG)
		}
		select {
		case <-a.done:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// insist is how long the kernel is asked again when it takes no answer, because pages
// are being given back. It takes one between the end of a removal, some microseconds
// after its event was read, and the beginning of the next, and to read that event first is
// to miss the moment. Measured (race kit, RemoveStorm: 384 faults while one thread gives
// pages back without a pause): 0.1 to 2.4 s, instead of 3 to 13 by pausing and reading.
const insist = 100 * time.Microsecond

// turn takes in what was read, reads what else waits, and answers some of it.
func (s *session) turn(read []uffd.Event) (outcome, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	more := !s.attendant.blocking || len(read) > 0 && s.events.Full()
	if err := s.takeIn(read); err != nil {
		return turnOver, err
	}
	if more {
		if err := errors.Join(s.block(false), s.drain()); err != nil {
			return turnOver, err
		}
	}
	waiting := len(s.queue)
	if waiting == 0 {
		return turnOver, nil
	}
	for begun := (time.Time{}); ; {
		n := min(waiting, quantum)
		batch := s.attendant.batch[:copy(s.attendant.batch[:], s.queue[:n])]
		s.queue = s.queue[:copy(s.queue, s.queue[n:])]
		if err := s.answer(batch); err != nil {
			return turnOver, err
		}
		if len(s.queue) < waiting {
			break
		}
		if begun.IsZero() {
			begun = time.Now()
		} else if time.Since(begun) > insist {
			break
		}
	}
	s.ledger.save(&s.counters)
	switch len(s.queue) {
	case 0:
		return turnOver, nil
	case waiting:
		return turnBlocked, nil
	default:
		return turnMore, nil
	}
}

// spareProcs are for all that is no session's thread.
const spareProcs = 8

// makeRoom lets so many threads wait in system calls without giving up their place in
// Go's scheduler (GOMAXPROCS), for which they would have to wait afterwards: the runtime takes it
// from those that wait, again and again, where there are fewer places than
// threads. Measured: 28 µs of processor time a fault instead of 10.
func makeRoom(threads int) {
	if n := threads + spareProcs; n > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(2 * n)
	}
}
