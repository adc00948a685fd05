//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
)

// target is a number that the page server is to reach.
type target struct {
	name  string
	value float64
	limit float64
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

// faultTargets notes those of the table.
func (b *bench) faultTargets(s setting, o *order, r results) {
	where := fmt.Sprintf("%d clones, %s", s.clones, strings.TrimSuffix(o.name, "'s"))
	if s.clones <= 8 {
		b.atMost(1.15, r.ratio(byCopy, byLoop, total, false), "(c) / (b), total, "+where)
		b.atMost(1.15, r.ratio(byCopy, byLoop, p50, true), "(c) / (b), p50, "+where)
	}
	b.atMost(1.2, r.ratio(byLater, byKernel, total, false), "(e) / (a), total, "+where)
	b.atMost(2, r.ratio(byReplayS, byKernel, total, false), "(f) share / (a), total, "+where)
}

// printTargets prints what was noted, and whether it was reached.
func (b *bench) printTargets() {
	if len(b.targets) == 0 {
		return
	}
	fmt.Printf("\n== targets (load %s)\n", load())
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, t := range b.targets {
		sign, word := "<=", "met"
		if t.atLeast {
			sign = ">="
		}
		if !t.met() {
			word = "MISSED"
		}
		fmt.Fprintf(w, "%s\t%.2f\t%s %g\t%s\n", t.name, t.value, sign, t.limit, word)
		b.Note("targets", t.name, t.value, word)
	}
	_ = w.Flush()
}
