//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"

	"fcvm/bench/internal/report"
)

// setting is how many clones touch how many pages, how often.
type setting struct {
	clones, pages int
	// rounds is even: single accesses are measured in every other one.
	rounds int
}

// benchFaults measures accesses to memory that is not there yet, by all variants.
func benchFaults(ctx context.Context, b *bench) error {
	const pages = 64 << 20 / pageSize
	// With eight clones on two cores the total time of a round varies by a third, and every other
	// round has one: the median of four was 0.92 to 1.40 in runs one after another.
	settings := []setting{{1, pages, 12}, {8, pages, 24}, {64, pages / 8, 4}}
	if b.quick {
		settings = []setting{{1, pages, 2}, {8, pages / 4, 2}, {64, pages / 32, 2}}
	}
	m, err := newMemory(b.dir, "mem", pages, nil)
	if err != nil {
		return err
	}
	defer m.close()
	nginx, err := recorded(b.dir, nginxOrder)
	if err != nil {
		return err
	}
	defer nginx.memory.close()
	for _, s := range settings {
		orders := []*order{sequential(m, pages).first(s.pages), random(m, pages).first(s.pages), nginx.first(s.pages)}
		if err := b.faultsOf(ctx, s, orders); err != nil {
			return err
		}
	}
	return nil
}

// faultsOf takes all variants in turn, and prints a table for each order.
func (b *bench) faultsOf(ctx context.Context, s setting, orders []*order) error {
	vs := variants(b.loop != "")
	results := make([]results, len(orders))
	for i := range results {
		results[i] = newResults()
	}
	for round := range s.rounds {
		for i, o := range orders {
			turn := slices.Clone(vs)
			if round/2%2 == 1 { // who comes later is no better off
				slices.Reverse(turn)
			}
			for _, v := range turn {
				if !b.cell.MatchString(fmt.Sprintf("%d %s %s", s.clones, o.name, v.name)) {
					continue
				}
				one, err := b.measure(ctx, v, o, s.clones, round%2 == 1)
				if err != nil {
					return err
				}
				results[i].add(v.name, one)
			}
		}
	}
	for i, o := range orders {
		if len(results[i]) == 0 {
			continue
		}
		title := fmt.Sprintf("%d clones at once, %s order", s.clones, o.name)
		fmt.Printf("\n%s: %d accesses each, %d rounds\n", title, len(o.list), s.rounds)
		if err := b.printFaults(title, vs, results[i]); err != nil {
			return err
		}
		b.faultTargets(s, o, results[i])
	}
	return nil
}

// results are the samples of each variant, by rounds.
type results map[string][]*sample

func newResults() results { return results{} }

func (r results) add(variant string, s *sample) { r[variant] = append(r[variant], s) }

// Numbers of a sample.
func total(s *sample) float64 { return s.totalMillis }
func p50(s *sample) float64   { return s.p50 }

// median of a number over the rounds in which it was measured: rounds with latencies
// have no total that counts, and the others have no latencies.
func (r results) median(variant string, of func(*sample) float64, latencies bool) float64 {
	var all []float64
	for _, s := range r[variant] {
		if (s.p999 > 0) == latencies {
			all = append(all, of(s))
		}
	}
	return report.Percentile(all, 50)
}

// ratio is the median of the rounds' ratios; 0 when there is nothing to compare with.
func (r results) ratio(variant, to string, of func(*sample) float64, latencies bool) float64 {
	return report.Percentile(r.ratios(variant, to, of, latencies), 50)
}

// ratios are those of the rounds.
func (r results) ratios(variant, to string, of func(*sample) float64, latencies bool) (all []float64) {
	for i, s := range r[variant] {
		if i < len(r[to]) && (s.p999 > 0) == latencies && of(r[to][i]) > 0 {
			all = append(all, of(s)/of(r[to][i]))
		}
	}
	return all
}

// printFaults prints the table of one order. What is 0 does not apply.
func (b *bench) printFaults(title string, vs []variant, r results) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tp50 µs\tp99\tp99.9\ttotal ms\tx (a)\tx (b)\tp50 x (b)\tfaults/access\tCPU µs/fault\tswitches/fault\tPSS MiB/clone\tahead ms/clone")
	for _, v := range vs {
		if len(r[v.name]) == 0 {
			continue
		}
		columns := []struct {
			name, format string
			value        float64
		}{
			{"p50 µs", "%.2f", r.median(v.name, p50, true)},
			{"p99 µs", "%.1f", r.median(v.name, func(s *sample) float64 { return s.p99 }, true)},
			{"p99.9 µs", "%.1f", r.median(v.name, func(s *sample) float64 { return s.p999 }, true)},
			{"total ms", "%.2f", r.median(v.name, total, false)},
			{"total x (a)", "%.2f", r.ratio(v.name, byKernel, total, false)},
			{"total x (b)", "%.2f", r.ratio(v.name, byLoop, total, false)},
			{"p50 x (b)", "%.2f", r.ratio(v.name, byLoop, p50, true)},
			{"faults an access", "%.4f", r.median(v.name, func(s *sample) float64 { return s.faults }, false)},
			{"CPU µs a fault", "%.1f", r.median(v.name, func(s *sample) float64 { return s.cpuMicros }, false)},
			{"switches a fault", "%.2f", r.median(v.name, func(s *sample) float64 { return s.switches }, false)},
			{"PSS MiB a clone", "%.2f", r.median(v.name, func(s *sample) float64 { return s.pssMiB }, false)},
			{"ahead ms a clone", "%.2f", r.median(v.name, func(s *sample) float64 { return s.aheadMillis }, false)},
		}
		fmt.Fprint(w, v.name)
		for _, c := range columns {
			if c.value == 0 {
				fmt.Fprint(w, "\t-")
				continue
			}
			fmt.Fprintf(w, "\t"+c.format, c.value)
			b.Note("faults", title+"; "+v.name+"; "+c.name, c.value, "")
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}
