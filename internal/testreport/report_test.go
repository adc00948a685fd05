package testreport

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report")
	t.Setenv(EnvFile, path)
	t.Setenv(envLab, "")
	add := func(e Entry) {
		t.Helper()
		if err := Append(e); err != nil {
			t.Fatal(err)
		}
	}
	q := Entry{Suite: "e2e", Engine: "qemu", Version: "7.2.22", Accel: "tcg", VMs: 2, Seconds: 30}
	for test, outcome := range map[string]Outcome{"a": Passed, "b": Passed, "c": Skipped} {
		e := q
		e.Test, e.Outcome = test, outcome
		add(e)
	}
	again := q
	again.Test, again.Outcome = "b", Failed
	add(again)
	t.Setenv(envLab, "1")
	add(Entry{Suite: "e2e", Test: "a", Engine: "firecracker", Version: "1.16.1", Accel: "kvm", Outcome: Passed, VMs: 1})
	add(Entry{Note: "no lab: why"})

	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all, err := Read(f)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := Table(&b, all); err != nil {
		t.Fatal(err)
	}
	want := `| suite | engine | accelerator | tests | VMs | minutes |
| --- | --- | --- | --- | ---: | ---: |
| e2e | Firecracker 1.16.1 | KVM, in the lab | 1 passed | 1 | 0.0 |
| e2e | QEMU 7.2.22 | TCG | 1 passed, 1 skipped, 1 failed | 8 | 2.0 |

no lab: why
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &b, want)
	}
}

func TestReadRefusesWhatIsNoReport(t *testing.T) {
	if _, err := Read(strings.NewReader("{}\nqemu tcg\n")); err == nil || !strings.Contains(err.Error(), "qemu tcg") {
		t.Errorf("got %v", err)
	}
}

func TestNothingIsReportedUnasked(t *testing.T) {
	t.Setenv(EnvFile, "")
	if err := Append(Entry{Suite: "x"}); err != nil {
		t.Error(err)
	}
}

func TestOutcomes(t *testing.T) {
	for _, c := range []struct {
		result result
		want   Outcome
	}{{result{}, Passed}, {result{skipped: true}, Skipped}, {result{failed: true, skipped: true}, Failed}} {
		if got := Of(c.result); got != c.want {
			t.Errorf("%+v: got %s, want %s", c.result, got, c.want)
		}
	}
}

type result struct{ failed, skipped bool }

func (r result) Failed() bool  { return r.failed }
func (r result) Skipped() bool { return r.skipped }
