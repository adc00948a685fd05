//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"fcvm/bench/internal/report"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/pstest"
)

// storm is where the clone is served that faults as fast as it can.
type storm int

const (
	noStorm storm = iota
	// elsewhere is another page server: what the storm still costs there is the
	// processors' share, which no page server can give back.
	elsewhere
	here
)

var stormNames = []string{"quiet clones alone", "storm at another page server", "storm at the same page server"}

// benchStorm measures what quiet clones notice of one clone with 64 threads in a fault
// storm. Policy copy, in which each access to a page that is not there is a fault.
func benchStorm(ctx context.Context, b *bench) error {
	const threads, quietClones = 64, 4
	rounds, pages, accesses := 7, 256<<20/pageSize, 400
	if b.quick {
		rounds, pages, accesses = 2, pages/4, 200
	}
	m, err := newMemory(b.dir, "storm.mem", pages, nil)
	if err != nil {
		return err
	}
	defer m.close()
	o := random(m, pages)

	defer flat()()
	p99s := map[storm][]float64{}
	p50s := map[storm][]float64{}
	rates := map[storm][]float64{}
	for range rounds {
		for _, where := range []storm{noStorm, elsewhere, here} {
			lat, rate, err := b.stormRound(ctx, where, o, threads, quietClones, accesses)
			if err != nil {
				return err
			}
			p := report.Percentiles(lat, 50, 99)
			p50s[where] = append(p50s[where], float64(p[0])/1e3)
			p99s[where] = append(p99s[where], float64(p[1])/1e3)
			rates[where] = append(rates[where], rate)
		}
	}
	fmt.Printf("%d clones with an access each 0.5 ms, %d accesses each; the storm has %d threads; %d rounds\n", quietClones, accesses, threads, rounds)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tp50 µs\tp99 µs\tstorm's faults/s")
	for where, name := range stormNames {
		where := storm(where)
		p50, p99, rate := report.Percentile(p50s[where], 50), report.Percentile(p99s[where], 50), report.Percentile(rates[where], 50)
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.0f\n", name, p50, p99, rate)
		b.Note("storm", name+"; p50", p50, "µs")
		b.Note("storm", name+"; p99", p99, "µs")
		b.Note("storm", name+"; faults of the storm", rate, "1/s")
	}
	var alone, other []float64
	for i, p99 := range p99s[here] {
		alone, other = append(alone, p99/p99s[noStorm][i]), append(other, p99/p99s[elsewhere][i])
	}
	b.atMost(2, report.Percentile(alone, 50), "p99 of quiet clones, with a storm / without")
	b.atMost(2, report.Percentile(other, 50), "p99 of quiet clones, storm at the same page server / at another")
	return w.Flush()
}

// stormRound returns the quiet clones' latencies in nanoseconds, and how many faults a
// second the storm had.
func (b *bench) stormRound(ctx context.Context, where storm, o *order, threads, quietClones, accesses int) (lat []uint32, rate float64, err error) {
	if err := o.memory.warm(); err != nil {
		return nil, 0, err
	}
	h, err := startHandler(ctx, b.handler, b.dir, pageserver.PolicyCopy, o.memory, "")
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, h.stop()) }()
	quiet, err := b.startClones(ctx, h, o.memory, quietClones, 1)
	if err != nil {
		return nil, 0, err
	}
	defer quiet.end()
	if where == noStorm {
		lat, err = b.quietly(ctx, quiet, o, accesses)
		return lat, 0, err
	}
	at := h
	if where == elsewhere {
		if at, err = startHandler(ctx, b.handler, b.dir, pageserver.PolicyCopy, o.memory, ""); err != nil {
			return nil, 0, err
		}
		defer func() { err = errors.Join(err, at.stop()) }()
	}
	wild, err := b.startClones(ctx, at, o.memory, 1, threads)
	if err != nil {
		return nil, 0, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// It is killed when the quiet ones are done.
		_, _ = wild[0].Run(stormScript(len(o.list), threads))
	}()
	defer func() { wild.end(); <-ended }()
	if err := awaitStorm(ctx, at, uint64(10*threads)); err != nil {
		return nil, 0, err
	}
	began := time.Now()
	before, err := at.faults(ctx)
	if err != nil {
		return nil, 0, err
	}
	if lat, err = b.quietly(ctx, quiet, o, accesses); err != nil {
		return nil, 0, err
	}
	after, err := at.faults(ctx)
	took := time.Since(began).Seconds()
	select {
	case <-ended:
		err = errors.Join(err, errors.New("the storm was over too soon"))
	default:
	}
	return lat, float64(after-before) / took, err
}

// awaitStorm waits until the page server answered so many faults.
func awaitStorm(ctx context.Context, h *handler, faults uint64) error {
	for {
		n, err := h.faults(ctx)
		if err != nil || n >= faults {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// stormScript has each thread touch its share of the pages, again and again.
func stormScript(pages, threads int) pstest.Script {
	s := pstest.Script{Threads: make([][]pstest.Op, threads)}
	each := pages / threads
	for i := range s.Threads {
		share := pstest.Pages{First: i * each, Count: each, Shuffle: uint64(i + 1)}
		for range 200 {
			s.Threads[i] = append(s.Threads[i],
				pstest.Op{Kind: pstest.Write, Pages: share}, pstest.Op{Kind: pstest.Remove, Pages: pstest.Range(share.First, each)})
		}
	}
	return s
}

// quietly has clones access one page after another, with pauses.
func (b *bench) quietly(ctx context.Context, c clones, o *order, accesses int) ([]uint32, error) {
	var ops []pstest.Op
	for _, p := range o.list[:accesses] {
		ops = append(ops, pstest.Op{Kind: pstest.Read, Pages: pstest.Page(int(p)), Latencies: true},
			pstest.Op{Kind: pstest.Sleep, Wait: 500 * time.Microsecond})
	}
	results, err := c.each(ctx, func(int) pstest.Script { return pstest.Script{Threads: [][]pstest.Op{ops}} })
	if err != nil {
		return nil, err
	}
	var lat []uint32
	for _, r := range results {
		if wrong := r.Wrong(); len(wrong) > 0 {
			return nil, errors.New(wrong[0])
		}
		for i := 0; i < len(r.Threads[0]); i += 2 {
			lat = append(lat, r.Threads[0][i].Latencies...)
		}
	}
	return lat, nil
}
