package api

// Serving is what a page server did for one VM since it began, whichever page
// server it was then.
type Serving struct {
	// Faults that the guest waited for (demand), among them those of writes and
	// those that waited for the disk (slow).
	Faults      uint64 `json:"faults"`
	WriteFaults uint64 `json:"write_faults"`
	SlowFaults  uint64 `json:"slow_faults"`
	// WokenFaults were answered by the template alone.
	WokenFaults uint64 `json:"woken_faults"`
	// CopiedBytes became pages of the VM's own, ZeroBytes are the zero page.
	CopiedBytes uint64 `json:"copied_bytes"`
	ZeroBytes   uint64 `json:"zero_bytes"`
	// ReplayedBytes were copied before the VM asked for them.
	ReplayedBytes uint64 `json:"replayed_bytes"`
	// RemovedBytes were given back by the guest, each time it did; RemovedPages
	// are zeros now for that reason.
	RemovedBytes uint64 `json:"removed_bytes"`
	RemovedPages int64  `json:"removed_pages"`
	// ParkedAnswers had to wait for such a removal (EAGAIN), LateAnswers found the
	// page there already (EEXIST).
	ParkedAnswers uint64 `json:"parked_answers"`
	LateAnswers   uint64 `json:"late_answers"`
	// Handovers is how often another page server took over.
	Handovers uint64 `json:"handovers"`
}

// Latency tells how long something took, over all times it was done.
type Latency struct {
	Count     uint64 `json:"count"`
	SumMicros uint64 `json:"sum_us"`
	// P50Micros, P99Micros and P999Micros are too long by at most a factor of two.
	P50Micros  float64 `json:"p50_us"`
	P99Micros  float64 `json:"p99_us"`
	P999Micros float64 `json:"p999_us"`
	// Buckets by ascending bound, those without a bound last.
	Buckets []Bucket `json:"buckets"`
}

// Bucket counts times that were up to a bound, and above the one before.
type Bucket struct {
	// UpToMicros is 0 in the last one, which has no bound.
	UpToMicros float64 `json:"up_to_us,omitempty"`
	Count      uint64  `json:"count"`
}

// Handovers tells of page servers that died and were replaced, from a death until
// all VMs were served again.
type Handovers struct {
	Count         int     `json:"count"`
	LastMillis    float64 `json:"last_ms"`
	LongestMillis float64 `json:"longest_ms"`
}
