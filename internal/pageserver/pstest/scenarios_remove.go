//go:build linux

package pstest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

func removedPages(l *lab) error {
	const pages, threads = 1024, 4
	if err := l.start(pages); err != nil {
		return err
	}
	if err := l.clones(2, threads); err != nil {
		return err
	}
	err := together(l.vmms, func(_ int, v *VMM) error {
		all := make([][]Op, threads)
		for t := range all {
			first := t * pages / threads
			untouched, read, written := Range(first, 64), Range(first+64, 64), Range(first+128, 64)
			all[t] = []Op{
				{Kind: Check, Pages: read, Expect: Expect{Snapshot: true}},
				{Kind: Fill, Pages: written, Version: 2},
				{Kind: Remove, Pages: Range(first, 192)},
				{Kind: Check, Pages: Range(first, 192), Expect: l.removed()},
				// Written to and given back once more, a page at a time.
				{Kind: Fill, Pages: untouched, Version: 3},
				{Kind: Check, Pages: untouched, Expect: Expect{Clone: v.config.Clone, Version: 3}},
				{Kind: Remove, Pages: Pages{First: first, Count: 64, Shuffle: l.Seed + 1}},
				{Kind: Check, Pages: untouched, Expect: l.removed()},
				{Kind: Check, Pages: Range(first+192, 64), Expect: Expect{Snapshot: true}},
			}
		}
		return l.do(v, all...)
	})
	if err != nil {
		return err
	}
	return l.served()
}

// orderly is one round of a scenario in which the page server is stopped, threads do
// something in a given order, each up to where it has to wait, and it then goes on:
// the kernel has all of that queued when the page server looks.
type orderly struct {
	all [][]Op
	pid int
}

// newOrderly has so many threads, of which number 0 is the conductor.
func newOrderly(threads, pid int) *orderly { return &orderly{make([][]Op, threads), pid} }

// add appends to what a thread does.
func (o *orderly) add(thread int, ops ...Op) { o.all[thread] = append(o.all[thread], ops...) }

// barrier makes all threads meet.
func (o *orderly) barrier() {
	for t := range o.all {
		o.add(t, Op{Kind: Barrier})
	}
}

// frozen has each of the threads do its operation after the one before it waits, or
// is through where the page server was not needed.
func (o *orderly) frozen(threads []int, op func(i int) Op) {
	o.add(0, Op{Kind: Freeze, PID: o.pid})
	o.barrier()
	var steps []int
	for i, t := range threads {
		if i > 0 {
			o.add(t, Op{Kind: AwaitAsleep, Others: threads[i-1 : i], Steps: steps[i-1 : i]})
		}
		steps = append(steps, len(o.all[t]))
		o.add(t, op(i))
	}
	o.add(0, Op{Kind: AwaitAsleep, Others: threads, Steps: steps}, Op{Kind: Thaw, PID: o.pid})
	o.barrier()
}

func removeBehindFaults(l *lab) error {
	const faulting = 8
	if err := l.start(rounds * 16); err != nil {
		return err
	}
	v, err := l.clone(faulting + 2)
	if err != nil {
		return err
	}
	o := newOrderly(faulting+2, l.server.PID())
	threads := []int{1, 2, 3, 4, 5, 6, 7, 8, 9}
	for round := range rounds {
		part := Range(round*16, faulting)
		kind := Read
		if round%4 == 3 {
			kind = Write
		}
		o.frozen(threads, func(i int) Op {
			if i == faulting {
				return Op{Kind: Remove, Pages: part}
			}
			return Op{Kind: kind, Pages: Page(part.First + i), Version: 2}
		})
		if kind == Read {
			// What the faults got may be from before; what is there now is not.
			o.add(1, Op{Kind: Check, Pages: part, Expect: l.removed()})
		} else {
			// The writes may come after, too, onto what was given back.
			o.add(1, Op{Kind: CheckWord, Pages: part, Expect: l.orOwn(v)})
		}
		o.barrier()
	}
	return l.do(v, o.all...)
}

// orOwn allows what removed does, and that the first word is of version 2.
func (l *lab) orOwn(v *VMM) Expect {
	e := l.removed()
	e.Clone, e.Version, e.Maybe = v.config.Clone, 2, true
	return e
}

func faultsDuringRemove(l *lab) error {
	const faulting, removing = 6, 3
	if err := l.start(rounds * 32); err != nil {
		return err
	}
	v, err := l.clone(1 + faulting + removing)
	if err != nil {
		return err
	}
	o := newOrderly(1+faulting+removing, l.server.PID())
	rnd := rand.New(rand.NewPCG(l.Seed, 3))
	for round := range rounds {
		// Faults and removals in any order, in different windows or the same.
		order := rnd.Perm(faulting + removing)
		threads := make([]int, len(order))
		spread := 1 + round%2*2
		for i, n := range order {
			threads[i] = 1 + n
		}
		o.frozen(threads, func(i int) Op {
			page := round*32 + order[i]*spread
			if order[i] < removing {
				return Op{Kind: Remove, Pages: Page(page)}
			}
			if order[i]%2 == 0 {
				return Op{Kind: Write, Pages: Page(page), Version: 2}
			}
			return Op{Kind: Check, Pages: Page(page), Expect: Expect{Snapshot: true}}
		})
		for n := range faulting + removing {
			page := Page(round*32 + n*spread)
			op := Op{Kind: Check, Pages: page, Expect: Expect{Snapshot: true}}
			if n < removing {
				op.Expect = l.removed()
			} else if n%2 == 0 {
				op = Op{Kind: CheckWord, Pages: page, Expect: Expect{Snapshot: true, Clone: v.config.Clone, Version: 2}}
			}
			o.add(1+n, op)
		}
		o.barrier()
	}
	return l.do(v, o.all...)
}

func removedNeighbour(l *lab) error {
	// Between the two faults that matter come more than a page server answers in one
	// go, each in a window of its own.
	const rounds, others, window = 24, 20, 16
	if err := l.start(rounds * (1 + others) * window); err != nil {
		return err
	}
	v, err := l.clone(3 + others)
	if err != nil {
		return err
	}
	o := newOrderly(3+others, l.server.PID())
	// Thread 1 faults on the neighbour, and thread 2 at last on the page that was given
	// back, which the answer to thread 1 may have mapped by then.
	threads := []int{1}
	for t := range others {
		threads = append(threads, 3+t)
	}
	threads = append(threads, 2)
	for round := range rounds {
		first := round * (1 + others) * window
		neighbour, removed := twoPages(first)
		if round%4 >= 2 {
			neighbour, removed = removed, neighbour
		}
		write := round%2 == 0
		o.add(2, Op{Kind: Remove, Pages: Page(removed)})
		o.barrier()
		o.frozen(threads, func(i int) Op {
			switch {
			case i == 0:
				return Op{Kind: Check, Pages: Page(neighbour), Expect: Expect{Snapshot: true}}
			case i <= others:
				return Op{Kind: Check, Pages: Page(first + i*window + round%window), Expect: Expect{Snapshot: true}}
			case write:
				return Op{Kind: Write, Pages: Page(removed), Version: 2}
			default:
				return Op{Kind: Check, Pages: Page(removed), Expect: l.removed()}
			}
		})
		if write {
			e := l.removed()
			e.Clone, e.Version = v.config.Clone, 2
			o.add(2, Op{Kind: CheckWord, Pages: Page(removed), Expect: e})
		}
	}
	return l.do(v, o.all...)
}

func removeStorm(l *lab) error {
	const pages, faults = 1024, 128
	if err := l.start(pages); err != nil {
		return err
	}
	v, err := l.clone(3)
	if err != nil {
		return err
	}
	// By one thread, as a balloon does it. With two, some removal is nearly always between
	// its event and its end, in which time the kernel lets no page be placed by anybody.
	return l.do(v,
		[]Op{{Kind: Remove, Pages: Pages{First: pages / 2, Count: pages / 2, Shuffle: l.Seed + 1}, Others: []int{1, 2}}},
		[]Op{{Kind: Check, Pages: Pages{Count: faults, Shuffle: l.Seed + 2}, Expect: Expect{Snapshot: true}}},
		[]Op{{Kind: Fill, Pages: Range(2*faults, faults), Version: 2}, {Kind: Check, Pages: Range(2*faults, faults), Expect: Expect{Clone: v.config.Clone, Version: 2}}})
}

func removeBeforeReplay(l *lab) error {
	const pages, part, clones = 2048, 512, 6
	if err := l.start(pages); err != nil {
		return err
	}
	// A page server that remembers what clones need learns it here.
	if err := l.served(); err != nil {
		return err
	}
	for n := range clones {
		v, err := l.vmm(Config{Threads: 4})
		if err != nil {
			return err
		}
		early, late, written := Range(0, part), Pages{First: part, Count: part, Shuffle: l.Seed + uint64(n) + 1}, Range(2*part, part)
		own := Expect{Clone: v.config.Clone, Version: 2}
		pause := Op{Kind: Sleep, Wait: 20 * time.Millisecond} // whatever comes late has come
		err = l.do(v,
			[]Op{{Kind: AwaitAsleep, Others: []int{1}, Steps: []int{0}}, {Kind: Connect, Handshake: &Handshake{Socket: l.server.Socket}}},
			// Given back before the page server has heard of the VMM, and while it brings
			// what was not asked for.
			[]Op{{Kind: Remove, Pages: early}, {Kind: Check, Pages: early, Expect: l.removed()}, {Kind: Barrier}, pause, {Kind: Check, Pages: early, Expect: l.removed()}},
			[]Op{{Kind: AwaitAsleep, Others: []int{1}, Steps: []int{0}}, {Kind: Remove, Pages: late}, {Kind: Barrier}, pause, {Kind: Check, Pages: late, Expect: l.removed()}},
			[]Op{{Kind: AwaitAsleep, Others: []int{1}, Steps: []int{0}}, {Kind: Fill, Pages: written, Version: 2}, {Kind: Barrier}, pause, {Kind: Check, Pages: written, Expect: own}})
		if err != nil {
			return err
		}
		if err := l.do(v, []Op{{Kind: Check, Pages: Range(3*part, part), Expect: Expect{Snapshot: true}}}); err != nil {
			return err
		}
	}
	return nil
}

// twoPages are two of the 16 pages from first on that are not holes.
func twoPages(first int) (a, b int) {
	for a = first; IsHole(a); {
		a++
	}
	for b = first + 15; IsHole(b); {
		b--
	}
	return a, b
}

func templateWhole(l *lab) error {
	const pages, leaders = 4096, 2
	for attempt := range 2 {
		if err := l.start(pages); err != nil {
			return err
		}
		if err := l.clones(leaders, 2); err != nil {
			return err
		}
		reader, err := l.clone(1)
		if err != nil {
			return err
		}
		swept := make(chan error, 1)
		go func() {
			swept <- together(l.vmms[:leaders], func(i int, v *VMM) error {
				return l.do(v,
					[]Op{{Kind: Read, Pages: Pages{Count: pages, Shuffle: l.Seed + uint64(i) + 1}}},
					[]Op{{Kind: Check, Pages: Pages{Count: pages, Shuffle: l.Seed + uint64(attempt) + 7}, Expect: Expect{Snapshot: true}}})
			})
		}()
		if err := l.readWhileStopped(reader, swept); err != nil {
			return err
		}
	}
	return nil
}

// readWhileStopped stops the page server again and again, at moments of no choosing,
// and has the reader look at what is new in the template. These pages are mapped
// by the kernel alone: nobody needs the page server for them.
func (l *lab) readWhileStopped(reader *VMM, swept <-chan error) error {
	rnd := rand.New(rand.NewPCG(l.Seed, 4))
	known := make([]bool, l.all().Count)
	stops, looked := 0, 0
	defer func() { l.logf("stopped the page server %d times, %d pages were new", stops, looked) }()
	for {
		select {
		case err := <-swept:
			return err
		case <-time.After(time.Duration(rnd.IntN(300)) * time.Microsecond):
		}
		if err := freeze(l.server.PID()); err != nil {
			return fmt.Errorf("stop page server: %w", err)
		}
		stops++
		fresh, err := newPages(int(l.server.Template.Fd()), known)
		if err == nil && len(fresh) > 0 {
			looked += len(fresh)
			err = l.do(reader, []Op{{Kind: Check, Pages: Pages{List: fresh}, Expect: Expect{Snapshot: true}}})
		}
		if err := unix.Kill(l.server.PID(), unix.SIGCONT); err != nil {
			return fmt.Errorf("let page server go on: %w", err)
		}
		if err != nil {
			return errors.Join(err, <-swept)
		}
	}
}

// newPages are those that the template has data for, and had none before.
func newPages(fd int, known []bool) (fresh []uint32, _ error) {
	for at := int64(0); at < int64(len(known))*PageSize; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("look at template: %w", err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("look at template: %w", err)
		}
		for p := start / PageSize; p < end/PageSize; p++ {
			if !known[p] {
				known[p] = true
				fresh = append(fresh, uint32(p))
			}
		}
		at = end
	}
	return fresh, nil
}
