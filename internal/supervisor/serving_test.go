package supervisor

import (
	"reflect"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
)

// TestNothingOfAPageServerIsLeftOut has no field of the API's that stays zero when
// the page server tells something.
func TestNothingOfAPageServerIsLeftOut(t *testing.T) {
	var se pageserver.SessionStats
	fill(t, reflect.ValueOf(&se).Elem())
	wantFilled(t, "Serving", reflect.ValueOf(*describeSession(se)))

	h := pageserver.Histogram{Count: 3, SumNanos: 5_000_000, Buckets: make([]uint64, pageserver.HistogramBuckets)}
	h.Buckets[0], h.Buckets[1], h.Buckets[pageserver.HistogramBuckets-1] = 1, 1, 1
	ps := PageServerStats{
		Stats: pageserver.Stats{
			PID: 1, TemplateBytes: 1, ReplayedBytes: 1, BackgroundBytes: 1, Faults: 1, Sessions: []pageserver.SessionStats{se}, Ended: 1,
			Failures: []pageserver.Failure{{}}, Refused: 1, WorkingSetPages: 1, Demand: h, Replay: h, Background: h,
		},
		RSSBytes: 1, Handovers: keeper.Handovers{Count: 1, Last: time.Second, Longest: time.Second},
	}
	got := describeServer(serverKey{Snapshot: "s", Policy: "share", NoReplay: true}, ps)
	wantFilled(t, "PageServerStats", reflect.ValueOf(got))

	b := got.Demand.Buckets
	if len(b) != pageserver.HistogramBuckets || b[0] != (api.Bucket{UpToMicros: 0.512, Count: 1}) || b[2] != (api.Bucket{UpToMicros: 2.048}) || b[len(b)-1] != (api.Bucket{Count: 1}) {
		t.Errorf("buckets are %v", b)
	}
	if got.Demand.SumMicros != 5000 || got.Handovers.LastMillis != 1000 || got.Demand.P50Micros != 1.024 {
		t.Errorf("got %+v", got)
	}
	// The buckets are the same ones before anything was counted.
	if e := latency(pageserver.Histogram{}); len(e.Buckets) != len(b) || e.Buckets[5].UpToMicros != b[5].UpToMicros || e.P99Micros != 0 {
		t.Errorf("of nothing: %+v", e)
	}
}

// fill sets all numbers in a struct to 1.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	for i := range v.NumField() {
		switch f := v.Field(i); {
		case f.CanUint():
			f.SetUint(1)
		case f.CanInt():
			f.SetInt(1)
		case f.Kind() == reflect.Struct && f.CanAddr() && f.Type() != reflect.TypeFor[time.Time]():
			fill(t, f)
		}
	}
}

func wantFilled(t *testing.T, name string, v reflect.Value) {
	t.Helper()
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("%s.%s is not told", name, v.Type().Field(i).Name)
		}
	}
}
