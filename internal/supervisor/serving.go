package supervisor

import (
	"time"

	"fcvm/internal/api"
	"fcvm/internal/pageserver"
)

// describeServer is what the API tells of a page server.
func describeServer(key serverKey, ps PageServerStats) api.PageServerStats {
	return api.PageServerStats{
		Snapshot: key.Snapshot, Policy: key.Policy, NoReplay: key.NoReplay, PID: ps.PID,
		TemplateBytes: ps.TemplateBytes, ReplayedBytes: ps.ReplayedBytes, BackgroundBytes: ps.BackgroundBytes,
		RSSBytes: ps.RSSBytes, WorkingSetPages: ps.WorkingSetPages,
		Sessions: len(ps.Sessions), EndedSessions: ps.Ended, Failures: len(ps.Failures), Refused: ps.Refused, Faults: ps.Faults,
		Demand: latency(ps.Demand), Replay: latency(ps.Replay), Background: latency(ps.Background),
		Handovers: api.Handovers{
			Count: ps.Handovers.Count, LastMillis: millis(ps.Handovers.Last), LongestMillis: millis(ps.Handovers.Longest),
		},
	}
}

func describeSession(s pageserver.SessionStats) *api.Serving {
	return &api.Serving{
		Faults: s.Faults, WriteFaults: s.WriteFaults, SlowFaults: s.Slow, WokenFaults: s.Woken,
		CopiedBytes: s.CopiedBytes, ZeroBytes: s.ZeroBytes, ReplayedBytes: s.ReplayedBytes,
		RemovedBytes: s.RemovedBytes, RemovedPages: s.RemovedPages,
		ParkedAnswers: s.Retries, LateAnswers: s.Present, Handovers: s.Handovers,
	}
}

// latency has all buckets that there may be, counted or not: Prometheus wants the
// same ones each time.
func latency(h pageserver.Histogram) api.Latency {
	l := api.Latency{
		Count: h.Count, SumMicros: h.SumNanos / 1000,
		P50Micros: micros(h.Quantile(0.5)), P99Micros: micros(h.Quantile(0.99)), P999Micros: micros(h.Quantile(0.999)),
		Buckets: make([]api.Bucket, pageserver.HistogramBuckets),
	}
	for i := range l.Buckets {
		if i < len(h.Buckets) {
			l.Buckets[i].Count = h.Buckets[i]
		}
		if i < len(l.Buckets)-1 { // the last one has also what is longer
			l.Buckets[i].UpToMicros = micros(pageserver.HistogramBound(i))
		}
	}
	return l
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
