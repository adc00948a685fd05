//go:build linux

package pstest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// Sizes of random histories. A wave is some clones that live at the same time, and
// ends early enough for the snapshot not to be used up: pages that were given back
// are zeros from then on. A page server lives through some waves, so that
// the later ones find a template that is filled.
const (
	historyClones  = 3
	historyThreads = 4
	historyPages   = 2048
	historyOps     = 10_000 // of a thread
	historyWaves   = 4
)

// Histories carries out at least so many random operations, and compares with a
// model of memory what each of them sees: threads of several clones of one snapshot
// read, write and give back pages of their own, of each other, and of all. The error
// tells the seed, with which the same operations can be had again, and wraps
// [ErrHung] when something hangs. It returns how many operations were carried out.
func (k *Kit) Histories(ctx context.Context, ops int) (done int, err error) {
	for wave := 0; done < ops; wave += historyWaves {
		err := k.run(ctx, "Histories", func(l *lab) error {
			if err := l.start(historyPages); err != nil {
				return err
			}
			for n := wave; n < wave+historyWaves && done < ops; n++ {
				c := Config{Threads: historyThreads, Regions: []Region{
					{Offset: 3 * historyPages / 4 * PageSize, Size: historyPages / 4 * PageSize}, {Size: 3 * historyPages / 4 * PageSize, Slot: n % 2},
				}}
				seed := k.Seed + uint64(n)
				some, err := l.wave(c, seed, historyOps)
				if done += some; err != nil {
					return fmt.Errorf("seed %d (the same again: -seed %d -ops %d): %w", seed, seed, historyClones*historyThreads*historyOps, err)
				}
			}
			return nil
		})
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// wave has some clones begin, carry out a history, and end.
func (l *lab) wave(c Config, seed uint64, ops int) (done int, err error) {
	rnd := rand.New(rand.NewPCG(seed, 6))
	before := len(l.vmms)
	for range historyClones {
		v, err := l.vmm(c)
		if err != nil {
			return 0, err
		}
		if err := v.Connect(Handshake{Socket: l.server.Socket}); err != nil {
			return 0, err
		}
	}
	vmms := l.vmms[before:]
	over := make(chan struct{})
	stuttered := make(chan error, 1)
	go func() {
		if seed%2 == 0 {
			stuttered <- nil
			return
		}
		stuttered <- l.stutter(over, rnd)
	}()
	counts := make([]int, len(vmms))
	err = together(vmms, func(i int, v *VMM) error {
		all := make([][]Op, v.config.Threads)
		for t := range all {
			all[t] = []Op{{Kind: History, History: &HistoryConfig{Seed: seed + uint64(v.config.Clone)<<32, Ops: ops}}}
		}
		r, err := l.script(v, all...)
		if err != nil {
			return err
		}
		for _, t := range r.Threads {
			counts[i] += t[0].Ops
		}
		return nil
	})
	close(over)
	if err2 := <-stuttered; err == nil {
		err = err2
	}
	for _, n := range counts {
		done += n
	}
	if err != nil {
		return done, err
	}
	for _, v := range vmms {
		if err := v.Stop(); err != nil {
			return done, err
		}
	}
	l.vmms = l.vmms[:before]
	return done, nil
}

// stutter stops the page server for a moment now and then, wherever it is: the VMMs
// get further then than they would otherwise.
func (l *lab) stutter(over <-chan struct{}, rnd *rand.Rand) error {
	for {
		select {
		case <-over:
			return nil
		case <-time.After(time.Duration(rnd.IntN(3000)) * time.Microsecond):
		}
		if err := freeze(l.server.PID()); err != nil {
			return fmt.Errorf("stop page server: %w", err)
		}
		time.Sleep(time.Duration(rnd.IntN(300)) * time.Microsecond)
		if err := unix.Kill(l.server.PID(), unix.SIGCONT); err != nil {
			return fmt.Errorf("let page server go on: %w", err)
		}
	}
}
