package vmmtest

import (
	"slices"
	"testing"
	"time"
)

// Bench measures how long it takes to restore a small VM, by each mem backend:
// from the call until the guest runs. The spread is as telling as the mean, so
// that p50 and p99 are reported.
func Bench(b *testing.B, newEngine New) {
	l := newLab(b, newEngine)
	l.bootGolden(b)
	l.takeSnapshot(b)
	l.golden.end(b)
	for _, way := range backends {
		b.Run(way.name, func(b *testing.B) { l.benchRestore(b, way) })
	}
}

func (l *lab) benchRestore(b *testing.B, way backend) {
	m := l.memory(b, way, l.snapshot)
	// The first clone also fills the template.
	l.restore(b, m, l.snapshot).end(b)
	var took []time.Duration
	for b.Loop() {
		b.StopTimer()
		config := l.restoreConfig(l.place(b, "bench"), m, l.snapshot, published(l.freePort(b)))
		b.StartTimer()
		begin := time.Now()
		v, err := l.engine.Restore(b.Context(), config)
		took = append(took, time.Since(begin))
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		(&started{VM: v, place: config.Place}).end(b)
		b.StartTimer()
	}
	slices.Sort(took)
	for _, p := range []struct {
		name string
		at   float64
	}{{"p50-ms", 0.5}, {"p99-ms", 0.99}} {
		at := took[min(len(took)-1, int(p.at*float64(len(took))))]
		b.ReportMetric(float64(at.Microseconds())/1000, p.name)
	}
}
