//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"fcvm/bench/internal/report"
)

// target is a number that the page server is to reach.
type target struct {
	name  string
	value float64
	limit float64
	// rounds are the values that value is the median of, if it is one of rounds.
	rounds []float64
	// atLeast tells that more is better.
	atLeast bool
}

func (t target) met() bool {
	if t.atLeast {
		return t.value >= t.limit
	}
	return t.value <= t.limit
}

// atMost notes a number that is to be no larger than limit; not one that was not
// measured.
func (b *bench) atMost(limit, value float64, name string) {
	if value == 0 {
		return
	}
	b.targets = append(b.targets, target{name: name, value: value, limit: limit})
}

// atLeast notes a number that is to be no smaller.
func (b *bench) atLeast(limit, value float64, name string) {
	b.targets = append(b.targets, target{name: name, value: value, limit: limit, atLeast: true})
}

// ratioAtMost notes the median of rounds' ratios, likewise.
func (b *bench) ratioAtMost(limit float64, rounds []float64, name string) {
	if len(rounds) > 0 {
		b.targets = append(b.targets, target{name: name, value: report.Percentile(rounds, 50), limit: limit, rounds: rounds})
	}
}

// faultTargets notes those of the table.
func (b *bench) faultTargets(s setting, o *order, r results) {
	where := fmt.Sprintf("%d clones, %s", s.clones, strings.TrimSuffix(o.name, "'s"))
	if s.clones <= 8 {
		b.ratioAtMost(1.15, r.ratios(byCopy, byLoop, total, false), "(c) / (b), total, "+where)
		b.ratioAtMost(1.15, r.ratios(byCopy, byLoop, p50, true), "(c) / (b), p50, "+where)
	}
	b.ratioAtMost(1.2, r.ratios(byLater, byKernel, total, false), "(e) / (a), total, "+where)
	b.ratioAtMost(2, r.ratios(byReplayS, byKernel, total, false), "(f) share / (a), total, "+where)
}

// printTargets prints what was noted, and whether it was reached.
func (b *bench) printTargets() {
	if len(b.targets) == 0 {
		return
	}
	fmt.Printf("\n== targets (load %s)\n", load())
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tmedian\tquartiles of the rounds\twanted\t")
	for _, t := range b.targets {
		sign, word := "<=", "met"
		if t.atLeast {
			sign = ">="
		}
		if !t.met() {
			word = "MISSED"
		}
		quartiles := "-"
		if len(t.rounds) > 0 {
			quartiles = fmt.Sprintf("%.2f to %.2f", report.Percentile(t.rounds, 25), report.Percentile(t.rounds, 75))
		}
		fmt.Fprintf(w, "%s\t%.2f\t%s\t%s %g\t%s\n", t.name, t.value, quartiles, sign, t.limit, word)
		b.Note("targets", t.name, t.value, word)
	}
	_ = w.Flush()
}
