//go:build linux

package main

import (
	"context"
	"fmt"
	"time"

	"fcvm/bench/internal/report"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/pstest"
)

// variant is one way in which clones get their memory.
type variant struct {
	name  string
	start func(ctx context.Context, b *bench, o *order) (server, error)
	// later tells that another clone was there before, and touched the same pages.
	later bool
}

// Names by which results are looked up.
const (
	byKernel  = "(a) kernel, MAP_PRIVATE of tmpfs"
	byLoop    = "(b) C loop, read + UFFDIO_COPY"
	byMapped  = "(b) C loop, all in its memory"
	byCopy    = "(c) copy"
	byShare   = "(d) share, first clones"
	byLater   = "(e) share, later clones"
	byReplayC = "(f) copy, replayed"
	byReplayS = "(f) share, replayed, first clones"
)

func variants(withLoop bool) []variant {
	all := []variant{{name: byKernel, start: func(_ context.Context, _ *bench, o *order) (server, error) {
		full, err := o.memory.template()
		return kernel{full}, err
	}}}
	if withLoop {
		by := func(mapped bool) func(context.Context, *bench, *order) (server, error) {
			return func(ctx context.Context, b *bench, o *order) (server, error) {
				return startLoop(ctx, b.loop, b.dir, o.memory.path, mapped)
			}
		}
		all = append(all, variant{name: byLoop, start: by(false)}, variant{name: byMapped, start: by(true)})
	}
	by := func(policy pageserver.Policy, set func(*bench, context.Context, *order) (string, error)) func(context.Context, *bench, *order) (server, error) {
		return func(ctx context.Context, b *bench, o *order) (server, error) {
			path, err := set(b, ctx, o)
			if err != nil {
				return nil, err
			}
			return startHandler(ctx, b.handler, b.dir, policy, o.memory, path)
		}
	}
	return append(all,
		variant{name: byCopy, start: by(pageserver.PolicyCopy, (*bench).noSet)},
		variant{name: byShare, start: by(pageserver.PolicyShare, (*bench).noSet)},
		// As with every snapshot that is new: what the first clone waits for is recorded.
		variant{name: byLater, start: by(pageserver.PolicyShare, (*bench).emptySet), later: true},
		variant{name: byReplayC, start: by(pageserver.PolicyCopy, (*bench).workingSet)},
		variant{name: byReplayS, start: by(pageserver.PolicyShare, (*bench).workingSet)},
	)
}

// sample is what one variant did once.
type sample struct {
	// totalMillis is from the first clone's begin to the last one's end.
	totalMillis float64
	// Latencies of single accesses in microseconds; 0 where they were not measured.
	p50, p99, p999 float64
	// faults an access, and what the server took for a fault.
	faults, cpuMicros, switches float64
	// aheadMillis is what was done before the clones began, for each of them.
	aheadMillis float64
	// pssMiB of a clone, afterwards.
	pssMiB float64
}

// measure lets n clones touch the pages of an order. Measuring each access takes some
// 60 ns of it, as long as an access that needs no fault: so the total is measured
// apart, without latencies.
func (b *bench) measure(ctx context.Context, v variant, o *order, n int, latencies bool) (_ *sample, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s, %s order, %d clones: %w", v.name, o.name, n, err)
		}
	}()
	if err := o.memory.warm(); err != nil {
		return nil, err
	}
	s, err := v.start(ctx, b, o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if h, ok := s.(*handler); ok && err != nil && h.said() != "" {
			err = fmt.Errorf("%w; uffd_handler said: %s", err, h.said())
		}
		if serr := s.stop(); err == nil {
			err = serr
		}
	}()
	if s.pid() != 0 && b.nice != 0 {
		if err := prefer(s.pid(), b.nice); err != nil {
			return nil, err
		}
	}
	if v.later {
		first, err := b.startClones(ctx, s, o.memory, 1, 1)
		if err != nil {
			return nil, err
		}
		defer first.end()
		if _, err := first.run(ctx, o, false); err != nil {
			return nil, err
		}
	}
	if err := backed((n + 1) * len(o.list) * pageSize); err != nil {
		return nil, err
	}
	c, err := b.startClones(ctx, s, o.memory, n, 1)
	if err != nil {
		return nil, err
	}
	defer c.end()
	if err := s.settle(ctx); err != nil {
		return nil, err
	}
	return b.observe(ctx, s, c, o, latencies)
}

// observe has clones run, and looks what that took.
func (b *bench) observe(ctx context.Context, s server, c clones, o *order, latencies bool) (*sample, error) {
	var out sample
	n := float64(len(c))
	if h, ok := s.(*handler); ok {
		ahead, err := h.ahead(ctx)
		if err != nil {
			return nil, err
		}
		out.aheadMillis = report.Millis(ahead) / n
	}
	faultsBefore, err := s.faults(ctx)
	if err != nil {
		return nil, err
	}
	before, err := usageOf(s.pid())
	if err != nil {
		return nil, err
	}
	outcomes, err := c.run(ctx, o, latencies)
	if err != nil {
		return nil, err
	}
	after, err := usageOf(s.pid())
	if err != nil {
		return nil, err
	}
	faultsAfter, err := s.faults(ctx)
	if err != nil {
		return nil, err
	}
	accesses := n * float64(len(o.list))
	faults := float64(faultsAfter - faultsBefore)
	if _, ok := s.(*loop); ok {
		faults = accesses
	}
	out.faults = faults / accesses
	// What a few faults took is lost in what the process does anyway.
	if took := after.minus(before); faults >= 100 {
		out.cpuMicros = float64(took.cpu) / float64(time.Microsecond) / faults
		out.switches = float64(took.switches) / faults
	}
	pss, _, err := c.pss()
	if err != nil {
		return nil, err
	}
	out.pssMiB = float64(pss) / (1 << 20) / n
	out.time(outcomes)
	return &out, nil
}

// time adds what the clones measured.
func (s *sample) time(outcomes []pstest.Outcome) {
	begin, end := outcomes[0].Began, time.Duration(0)
	var all []uint32
	for _, o := range outcomes {
		begin, end = min(begin, o.Began), max(end, o.Began+o.Elapsed)
		all = append(all, o.Latencies...)
	}
	s.totalMillis = report.Millis(end - begin)
	p := report.Percentiles(all, 50, 99, 99.9)
	s.p50, s.p99, s.p999 = float64(p[0])/1e3, float64(p[1])/1e3, float64(p[2])/1e3
}
