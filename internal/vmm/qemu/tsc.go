package qemu

import "time"

// TSCKHz measures the host's TSC, which TCG passes to its guests unscaled. 0
// means that there is none to measure.
//
// A guest on microvm that calibrates its TSC itself, against an emulated timer,
// hung in 1 of 5 boots; with this number on its command line none of 30 did.
// The kernel's own figure is nowhere to be read: "cpu MHz" of /proc/cpuinfo is
// the current clock, and dmesg is root's. Counting over 20 ms, each end
// bracketed to the tightest of several reads, repeats within 5 ppm.
func TSCKHz() uint64 {
	const span = 20 * time.Millisecond
	begin := time.Now()
	t0, c0 := tscNow(begin)
	time.Sleep(span)
	t1, c1 := tscNow(begin)
	if t1 <= t0 || c1 <= c0 {
		return 0
	}
	return uint64(float64(c1-c0) / float64((t1 - t0).Nanoseconds()) * 1e6)
}

// tscNow reads the clock and the TSC together: of several tries the one that
// was interrupted least.
func tscNow(begin time.Time) (time.Duration, uint64) {
	var at time.Duration
	var count uint64
	best := time.Duration(1 << 62)
	for range 64 {
		before := time.Since(begin)
		c := rdtsc()
		after := time.Since(begin)
		if d := after - before; d < best {
			best, at, count = d, before+d/2, c
		}
	}
	return at, count
}
