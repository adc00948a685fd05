package metrics

import (
	"bytes"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"fcvm/internal/api"
)

func testStats() api.Stats {
	latency := api.Latency{Count: 7, SumMicros: 1500, Buckets: []api.Bucket{{UpToMicros: 0.512, Count: 1}, {UpToMicros: 1.024}, {UpToMicros: 2.048, Count: 4}, {Count: 2}}}
	return api.Stats{
		VMs: []api.VMStats{
			{Name: "golden", RSSBytes: 100 << 20, PrivateBytes: 100 << 20, MemoryBytes: 512 << 20},
			{
				Name: "web-1", Snapshot: "base", Policy: "share", RSSBytes: 20 << 20, SharedBytes: 18 << 20, PSSBytes: 4 << 20,
				Serving: &api.Serving{Faults: 254, WriteFaults: 100, SlowFaults: 3, ParkedAnswers: 2, RemovedPages: 5, Handovers: 1},
			},
			{Name: "web-2", Snapshot: "base", Policy: "copy", Serving: &api.Serving{Faults: 9, CopiedBytes: 36864, ZeroBytes: 4096}},
		},
		PageServers: []api.PageServerStats{
			{Snapshot: "base", Policy: "share", Sessions: 1, Faults: 300, TemplateBytes: 18 << 20, Demand: latency, Handovers: api.Handovers{Count: 1, LongestMillis: 80}},
			{Snapshot: "base", Policy: "copy", Sessions: 1, Demand: latency},
		},
		Total: api.TotalStats{UnsharedBytes: 1 << 30, HeldBytes: 1 << 28},
	}
}

func testText() []byte {
	vms := []api.VM{{State: api.StateRunning}, {State: api.StateRunning}, {State: api.StateExited}}
	return Text("1.0", vms, testStats())
}

func parse(t *testing.T, b []byte) map[string]*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("%v in:\n%s", err, b)
	}
	return families
}

func TestLint(t *testing.T) {
	problems, err := promlint.New(bytes.NewReader(testText())).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestTextIsPrometheusOwn holds what is written to what Prometheus' library writes
// of it.
func TestTextIsPrometheusOwn(t *testing.T) {
	text := testText()
	families := parse(t, text)
	var want bytes.Buffer
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, _, _ = strings.Cut(name, " ")
			if _, err := expfmt.MetricFamilyToText(&want, families[name]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := string(text); got != want.String() {
		t.Errorf("got:\n%s\nwant:\n%s", got, want.String())
	}
}

func TestValues(t *testing.T) {
	text := string(testText())
	for _, want := range []string{
		`fcvm_build_info{version="1.0"} 1`,
		`fcvm_vms{state="running"} 2`,
		`fcvm_vms{state="paused"} 0`,
		`fcvm_held_bytes 2.68435456e+08`,
		`fcvm_vm_memory_bytes{vm="golden",snapshot="",policy=""} 5.36870912e+08`,
		`fcvm_vm_faults_total{vm="web-1",snapshot="base",policy="share"} 254`,
		`fcvm_vm_parked_answers_total{vm="web-1",snapshot="base",policy="share"} 2`,
		`fcvm_vm_zero_bytes_total{vm="web-2",snapshot="base",policy="copy"} 4096`,
		`fcvm_pageserver_demand_seconds_bucket{snapshot="base",policy="share",replay="true",le="5.12e-07"} 1`,
		`fcvm_pageserver_demand_seconds_bucket{snapshot="base",policy="share",replay="true",le="2.048e-06"} 5`,
		`fcvm_pageserver_demand_seconds_bucket{snapshot="base",policy="share",replay="true",le="+Inf"} 7`,
		`fcvm_pageserver_demand_seconds_sum{snapshot="base",policy="share",replay="true"} 0.0015`,
		`fcvm_pageserver_demand_seconds_count{snapshot="base",policy="share",replay="true"} 7`,
		`fcvm_pageserver_handover_longest_seconds{snapshot="base",policy="share",replay="true"} 0.08`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	// A VM that no page server serves has no such counters.
	if strings.Contains(text, `faults_total{vm="golden"`) {
		t.Error("the golden VM has faults")
	}
}

func TestNothingRuns(t *testing.T) {
	families := parse(t, Text("1.0", nil, api.Stats{}))
	if families["fcvm_vms"] == nil || families["fcvm_vm_memory_bytes"] != nil || families["fcvm_pageserver_faults_total"] != nil {
		t.Errorf("got %v", families)
	}
}

func FuzzLabels(f *testing.F) {
	f.Add("a\"b\\c\nd", 1.5)
	f.Add("\xff", -1.0)
	f.Fuzz(func(t *testing.T, value string, n float64) {
		x := &text{}
		x.family("m", gauge, value).add(n, labels{"l", value})
		got := parse(t, x.bytes())["m"].GetMetric()[0].GetLabel()[0].GetValue()
		if want := strings.ToValidUTF8(value, "\uFFFD"); got != want {
			t.Errorf("wrote %q, and %q is read", want, got)
		}
	})
}
