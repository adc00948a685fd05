//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"fcvm/internal/memstat"
	"fcvm/internal/pageserver/pstest"
)

// clones are fake VMMs that are served.
type clones []*pstest.VMM

// startClones starts n clones with so many threads each, and returns when all are
// served.
func (b *bench) startClones(ctx context.Context, s server, m *memory, n, threads int) (_ clones, err error) {
	all := make(clones, n)
	defer func() {
		if err != nil {
			all.end()
		}
	}()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range all {
		g.Go(func() (err error) {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			// The context is that of the clone's life.
			all[i], err = pstest.StartVMM(ctx, pstest.Config{
				Shape: s.shape(), Regions: []pstest.Region{{Size: m.size()}}, Threads: threads, Clone: uint16(i + 1),
			}, s.template())
			if err != nil || s.handshake() == "" {
				return err
			}
			if err := all[i].Connect(pstest.Handshake{Socket: s.handshake()}); err != nil {
				return err
			}
			_, err = all[i].Run(pstest.Script{Threads: [][]pstest.Op{{{Kind: pstest.Read, Pages: pstest.Page(m.pages - 1)}}}})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("start clones: %w", err)
	}
	return all, nil
}

// end kills all clones.
func (c clones) end() {
	var g errgroup.Group
	for _, v := range c {
		if v != nil {
			g.Go(func() error { v.Kill(); return nil })
		}
	}
	_ = g.Wait()
}

// run has all clones touch the pages of an order, at once.
func (c clones) run(ctx context.Context, o *order, latencies bool) ([]pstest.Outcome, error) {
	// By then all threads wait.
	begin := pstest.Clock() + 20*time.Millisecond + time.Duration(len(c))*500*time.Microsecond
	script := pstest.Script{Threads: [][]pstest.Op{{{Kind: pstest.Sleep, Until: begin}, o.access(latencies)}}}
	results, err := c.each(ctx, func(int) pstest.Script { return script })
	if err != nil {
		return nil, err
	}
	outcomes := make([]pstest.Outcome, len(c))
	want := o.sum()
	for i, r := range results {
		outcomes[i] = r.Threads[0][1]
		if wrong := r.Wrong(); len(wrong) > 0 {
			return nil, errors.New(wrong[0])
		}
		if outcomes[i].Sum != want {
			return nil, fmt.Errorf("clone %d read %#x, want %#x: a page was wrong", i+1, outcomes[i].Sum, want)
		}
	}
	return outcomes, nil
}

// each runs a script in each clone, all at once.
func (c clones) each(ctx context.Context, script func(i int) pstest.Script) ([]*pstest.Result, error) {
	results := make([]*pstest.Result, len(c))
	var g errgroup.Group
	for i, v := range c {
		g.Go(func() (err error) {
			results[i], err = v.Run(script(i))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	return results, nil
}

// pss sums up what clones hold of their memory, in bytes: proportionally, and what
// is anonymous, which only they can use.
func (c clones) pss() (pss, private int64, err error) {
	for _, v := range c {
		u, err := memstat.Process(v.PID(), v.Mapped())
		if err != nil {
			return 0, 0, err
		}
		pss, private = pss+u.PSS, private+u.Anon
	}
	return pss, private, nil
}
