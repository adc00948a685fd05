//go:build linux

package pstest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

func exitInFault(l *lab) error {
	const pages, threads, times = 2048, 6, 12
	if err := l.start(pages); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(l.Seed, 5))
	for n := range times {
		v, err := l.clone(threads + 2)
		if err != nil {
			return err
		}
		wait := time.Duration(rnd.IntN(5000)) * time.Microsecond
		var all [][]Op
		for t := range threads {
			all = append(all, []Op{
				{Kind: Read, Pages: Pages{Count: pages, Shuffle: l.Seed + uint64(t) + 1}},
				{Kind: Remove, Pages: Range(t*pages/threads, pages/threads)}, {Kind: Fill, Pages: l.all()},
			})
		}
		end := Exit
		if n%2 == 0 {
			end = Die
		}
		all = append(all, []Op{{Kind: Sleep, Wait: wait}, {Kind: end}})
		if n%4 < 2 {
			// A fault, and a removal, that nobody had looked at yet when it ended.
			others := []int{threads, threads + 1}
			all = [][]Op{
				threads: {{Kind: Read, Pages: Page(n)}}, threads + 1: {{Kind: Remove, Pages: Page(n + 100)}},
				0: {{Kind: Freeze, PID: l.server.PID()}, {Kind: Barrier}, {Kind: AwaitAsleep, Others: others, Steps: []int{1, 1}}, {Kind: Thaw, PID: l.server.PID()}, {Kind: end}},
			}
			for _, t := range others {
				all[t] = append([]Op{{Kind: Barrier}}, all[t]...)
			}
			for t := 1; t < threads; t++ {
				all[t] = []Op{{Kind: Barrier}}
			}
		}
		if err := l.do(v, all...); !errors.Is(err, ErrEnded) {
			return fmt.Errorf("a VMM was to end in its faults: %w", err)
		}
		if _, err := v.Ended(patience); err != nil {
			return err
		}
		if n%4 == 3 {
			if err := l.served(); err != nil {
				return err
			}
		}
	}
	return nil
}

func teardown(l *lab) error {
	const pages = 512
	if err := l.start(pages); err != nil {
		return err
	}
	if err := l.clones(6, 2); err != nil {
		return err
	}
	half := Range(0, pages/2)
	err := together(l.vmms, func(i int, v *VMM) error {
		err := l.do(v,
			[]Op{{Kind: Check, Pages: half, Expect: Expect{Snapshot: true}}, {Kind: Barrier}, {Kind: Unmap, Pages: half}},
			// While the other half is in use.
			[]Op{{Kind: Barrier}, {Kind: Check, Pages: Range(pages/2, pages/4), Expect: Expect{Snapshot: true}}})
		if err != nil {
			return err
		}
		switch i % 3 {
		case 0: // ends in order, with the connection open
			return v.Stop()
		case 1: // ends the connection first; what it has not touched may never come then
			if err := v.Disconnect(); err != nil {
				return err
			}
			return v.Stop()
		default:
			v.Kill()
			return nil
		}
	})
	if err != nil {
		return err
	}
	return l.served()
}

func manySessions(l *lab) error {
	const pages, sessions = 512, 100
	if err := l.start(pages); err != nil {
		return err
	}
	if err := l.clones(sessions, 1); err != nil {
		return err
	}
	return together(l.vmms, func(i int, v *VMM) error {
		own := Pages{First: 100, Count: 100, Shuffle: uint64(i + 1)}
		return l.do(v, []Op{
			{Kind: Check, Pages: Pages{Count: pages, Shuffle: uint64(i + 1)}, Expect: Expect{Snapshot: true}},
			{Kind: Fill, Pages: own, Version: 2},
			{Kind: Remove, Pages: Range(300, 50)},
			{Kind: Check, Pages: own, Expect: Expect{Clone: v.config.Clone, Version: 2}},
			{Kind: Check, Pages: Range(300, 50), Expect: l.removed()},
		})
	})
}
