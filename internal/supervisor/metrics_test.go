package supervisor

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"fcvm/internal/api"
)

func TestMetrics(t *testing.T) {
	b := idleBench(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	b.options = func(o *Options) { o.Metrics = address }
	b.start()
	b.golden()
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "c", Count: 1})
	byClient, err := b.c.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	byTCP, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for how, text := range map[string]string{"socket": string(byClient), "TCP": string(byTCP)} {
		for _, want := range []string{
			`fcvm_build_info{version="test"} 1`,
			`fcvm_vms{state="running"} 2`,
			`fcvm_vm_memory_bytes{vm="golden",snapshot="",policy=""} `,
			`fcvm_vm_memory_bytes{vm="c",snapshot="snap",policy="share"} `,
			`fcvm_pageserver_faults_total{snapshot="snap",policy="share",replay="true"} 7`,
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %s in:\n%s", how, want, text)
			}
		}
	}
}

// TestMetricsAddressIsRefused: the supervisor does not run without what it was
// told to do.
func TestMetricsAddressIsRefused(t *testing.T) {
	b := idleBench(t)
	b.options = func(o *Options) { o.Metrics = "0.0.0.0:9464" }
	e := apiError(t, Run(t.Context(), b.opts()), api.CodeInvalid)
	if !strings.Contains(e.Message, "loopback") || e.Hint == "" {
		t.Errorf("%+v", e)
	}
}

func TestStatsOfOneVM(t *testing.T) {
	b := newBench(t)
	b.golden()
	b.run("ended", "exit", "0")
	if _, err := b.c.Wait(t.Context(), "ended"); err != nil {
		t.Fatal(err)
	}
	if st, err := b.c.VMStats(t.Context(), "golden"); err != nil || st == nil || st.Name != "golden" {
		t.Errorf("%+v, %v", st, err)
	}
	if st, err := b.c.VMStats(t.Context(), "ended"); err != nil || st != nil {
		t.Errorf("%+v, %v", st, err)
	}
	_, err := b.c.VMStats(t.Context(), "nobody")
	wantCode(t, err, api.CodeNotFound)
}
