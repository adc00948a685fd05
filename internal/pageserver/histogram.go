//go:build linux

package pageserver

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// HistogramBuckets reach from half a microsecond to 4 s, each twice as far as the
// one before it.
const HistogramBuckets = 24

// histogramShift makes 512 ns the first bound.
const histogramShift = 9

// Histogram counts durations.
type Histogram struct {
	Count uint64 `json:"count"`
	// SumNanos is the sum of all durations in nanoseconds.
	SumNanos uint64 `json:"sum_ns"`
	// Buckets count the durations up to [HistogramBound] of their index, and the last one
	// also all that are longer. Those behind the last count are left out.
	Buckets []uint64 `json:"buckets"`
}

// HistogramBound is the upper bound of a bucket.
func HistogramBound(bucket int) time.Duration { return 1 << (histogramShift + bucket) }

// Quantile returns the bound of the bucket that holds the quantile q, from 0 to 1:
// it is too long by at most a factor of two. It is 0 when nothing was counted.
func (h Histogram) Quantile(q float64) time.Duration {
	left := uint64(q * float64(h.Count))
	for i, n := range h.Buckets {
		if n > left {
			return HistogramBound(i)
		}
		left -= n
	}
	if h.Count == 0 || len(h.Buckets) == 0 {
		return 0
	}
	return HistogramBound(len(h.Buckets) - 1)
}

// histogram is one that is being counted, by many at once.
type histogram struct {
	sum     atomic.Uint64
	buckets [HistogramBuckets]atomic.Uint64
}

// add counts n durations d.
func (h *histogram) add(d time.Duration, n int) {
	ns := uint64(max(d, 0))
	i := max(0, bits.Len64(ns)-histogramShift)
	h.buckets[min(i, HistogramBuckets-1)].Add(uint64(n))
	h.sum.Add(ns * uint64(n))
}

func (h *histogram) snapshot() Histogram {
	out := Histogram{SumNanos: h.sum.Load(), Buckets: []uint64{}}
	for i := range h.buckets {
		if n := h.buckets[i].Load(); n > 0 {
			for len(out.Buckets) < i {
				out.Buckets = append(out.Buckets, 0)
			}
			out.Buckets = append(out.Buckets, n)
			out.Count += n
		}
	}
	return out
}

// count returns how many durations were counted.
func (h *histogram) count() (n uint64) {
	for i := range h.buckets {
		n += h.buckets[i].Load()
	}
	return n
}
