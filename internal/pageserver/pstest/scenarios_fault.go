//go:build linux

package pstest

import (
	"fmt"
	"math/rand/v2"
)

func wholeSnapshot(l *lab) error {
	const pages = 2048
	if err := l.start(pages); err != nil {
		return err
	}
	if err := l.clones(3, 2); err != nil {
		return err
	}
	snapshot := Expect{Snapshot: true}
	return together(l.vmms, func(i int, v *VMM) error {
		return l.do(v,
			[]Op{{Kind: Check, Pages: l.all(), Expect: snapshot}},
			[]Op{{Kind: Check, Pages: Pages{Count: pages, Shuffle: l.Seed + uint64(i) + 1}, Expect: snapshot}})
	})
}

func regions(l *lab) error {
	const pages = 1024
	if err := l.start(pages); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(l.Seed, 1))
	for range 6 {
		// The file in pieces, one of them left out, announced and mapped in any order.
		cuts := []int{0, 1, 1 + rnd.IntN(200), 300 + rnd.IntN(100), 500, 501 + rnd.IntN(500), pages}
		var rs []Region
		out := rnd.IntN(len(cuts) - 1)
		for i := range len(cuts) - 1 {
			if i != out && cuts[i] < cuts[i+1] {
				rs = append(rs, Region{Offset: int64(cuts[i]) * PageSize, Size: int64(cuts[i+1]-cuts[i]) * PageSize, Slot: rnd.IntN(6)})
			}
		}
		rnd.Shuffle(len(rs), func(i, j int) { rs[i], rs[j] = rs[j], rs[i] })
		v, err := l.vmm(Config{Regions: rs, Threads: len(rs)})
		if err != nil {
			return err
		}
		if err := v.Connect(Handshake{Socket: l.server.Socket}); err != nil {
			return err
		}
		var threads [][]Op
		for _, r := range rs {
			first, n := int(r.Offset/PageSize), int(r.Size/PageSize)
			threads = append(threads, []Op{
				// Its edges, then all of it.
				{Kind: Check, Pages: Page(first + n - 1), Expect: Expect{Snapshot: true}},
				{Kind: Check, Pages: Range(first, n), Expect: Expect{Snapshot: true}},
				{Kind: Remove, Pages: Page(first)},
				{Kind: Check, Pages: Page(first), Expect: l.removed()},
			})
		}
		if err := l.do(v, threads...); err != nil {
			return fmt.Errorf("regions %+v: %w", rs, err)
		}
	}
	return nil
}

// rounds of a scenario in which threads meet at barriers.
const rounds = 64

func samePage(l *lab) error {
	const threads = 12
	if err := l.start(3 * rounds); err != nil {
		return err
	}
	if err := l.clones(2, threads); err != nil {
		return err
	}
	return together(l.vmms, func(_ int, v *VMM) error {
		all := make([][]Op, threads)
		for round := range 3 * rounds {
			// All read, all write, or every other one.
			for t := range all {
				access := Op{Kind: Check, Pages: Page(round), Expect: Expect{Snapshot: true}}
				if round%3 == 1 || round%3 == 2 && t%2 == 0 {
					access = Op{Kind: Write, Pages: Page(round), Version: 5}
				} else if round%3 == 2 {
					access = Op{Kind: Read, Pages: Page(round)}
				}
				all[t] = append(all[t], Op{Kind: Barrier}, access)
				if round%3 > 0 { // the word that they all wrote, and the others
					all[t] = append(all[t], Op{Kind: Barrier}, Op{Kind: CheckWord, Pages: Page(round), Expect: Expect{Snapshot: true, Clone: v.config.Clone, Version: 5}})
				}
			}
		}
		return l.do(v, all...)
	})
}

func neighbours(l *lab) error {
	const threads = 16
	if err := l.start(rounds * threads); err != nil {
		return err
	}
	if err := l.clones(2, threads); err != nil {
		return err
	}
	return together(l.vmms, func(i int, v *VMM) error {
		all := make([][]Op, threads)
		for round := range rounds {
			for t := range all {
				page := Page(round*threads + t)
				ops := []Op{{Kind: Barrier}, {Kind: Check, Pages: page, Expect: Expect{Snapshot: true}}}
				if (round+t+i)%3 == 0 {
					ops = []Op{
						{Kind: Barrier}, {Kind: Write, Pages: page, Version: 6},
						{Kind: CheckWord, Pages: page, Expect: Expect{Snapshot: true, Clone: v.config.Clone, Version: 6}},
					}
				}
				all[t] = append(all[t], ops...)
			}
		}
		return l.do(v, all...)
	})
}

func crossTalk(l *lab) error {
	const pages, clones, threads = 1024, 4, 2
	if err := l.start(pages); err != nil {
		return err
	}
	if err := l.clones(clones, threads); err != nil {
		return err
	}
	err := together(l.vmms, func(i int, v *VMM) error {
		all := make([][]Op, threads)
		for t := range all {
			part := Pages{First: t * pages / threads, Count: pages / threads, Shuffle: l.Seed + uint64(t) + 1}
			own := Expect{Clone: v.config.Clone, Version: 3}
			all[t] = []Op{
				{Kind: Check, Pages: Range(part.First+i*8, 64), Expect: Expect{Snapshot: true}},
				{Kind: Fill, Pages: part, Version: 3}, {Kind: Check, Pages: part, Expect: own},
				{Kind: Barrier}, {Kind: Check, Pages: l.all(), Expect: own},
			}
		}
		return l.do(v, all...)
	})
	if err != nil {
		return err
	}
	if err := l.served(); err != nil {
		return err
	}
	// And still nobody sees another's.
	return together(l.vmms[:clones], func(_ int, v *VMM) error {
		return l.do(v, []Op{{Kind: Check, Pages: l.all(), Expect: Expect{Clone: v.config.Clone, Version: 3}}})
	})
}
