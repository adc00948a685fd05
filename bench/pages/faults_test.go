//go:build linux

package main

import (
	"os"
	"testing"
	"time"
)

// What was not measured in a round counts in no median and no ratio.
func TestMedians(t *testing.T) {
	r := newResults()
	for _, ms := range []float64{2, 10, 4} {
		r.add(byKernel, &sample{totalMillis: ms})
		r.add(byCopy, &sample{totalMillis: 3 * ms})
		r.add(byKernel, &sample{totalMillis: 1000, p50: ms, p999: 1})
		r.add(byCopy, &sample{totalMillis: 1, p50: 2 * ms, p999: 1})
	}
	for what, got := range map[string][2]float64{
		"median total":      {r.median(byKernel, total, false), 4},
		"median p50":        {r.median(byCopy, p50, true), 8},
		"ratio of totals":   {r.ratio(byCopy, byKernel, total, false), 3},
		"ratio of p50":      {r.ratio(byCopy, byKernel, p50, true), 2},
		"ratio to nothing":  {r.ratio(byCopy, byLoop, total, false), 0},
		"median of nothing": {r.median(byLoop, total, false), 0},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: %v, want %v", what, got[0], got[1])
		}
	}
}

func TestTargets(t *testing.T) {
	for _, one := range []struct {
		target target
		met    bool
	}{
		{target{value: 1.15, limit: 1.15}, true},
		{target{value: 1.16, limit: 1.15}, false},
		{target{value: 90, limit: 90, atLeast: true}, true},
		{target{value: 89, limit: 90, atLeast: true}, false},
	} {
		if one.target.met() != one.met {
			t.Errorf("%+v: met is %v", one.target, !one.met)
		}
	}
}

// The clock of a process goes on while it works, and its switches are counted.
func TestUsage(t *testing.T) {
	before, err := usageOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		time.Sleep(time.Microsecond)
		after, err := usageOf(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if took := after.minus(before); took.cpu > 0 && took.switches > 0 {
			break
		}
	}
	if peak, err := peakBytes(os.Getpid()); err != nil || peak < 1<<20 {
		t.Errorf("peak of %d bytes, %v", peak, err)
	}
	if none, err := usageOf(0); err != nil || none != (usage{}) {
		t.Errorf("the kernel took %v, %v", none, err)
	}
}
