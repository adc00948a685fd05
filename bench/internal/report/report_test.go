package report

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestPercentiles(t *testing.T) {
	values := []int{5, 1, 4, 2, 3}
	if got := Percentiles(values, 0, 20, 50, 99, 100); !slices.Equal(got, []int{1, 1, 3, 5, 5}) {
		t.Errorf("got %v", got)
	}
	if values[0] != 5 {
		t.Error("the caller's values were sorted")
	}
	if got := Percentile([]float64{}, 50); got != 0 {
		t.Errorf("of none: %v", got)
	}
}

func TestWrite(t *testing.T) {
	r := Report{Host: Host{CPUs: 2}}
	r.Note("a", "b", 1.5, "ms")
	path := filepath.Join(t.TempDir(), "out.json")
	if err := r.Write(path); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Version int
		Host    Host
		Results []Result
	}
	if err := json.Unmarshal(raw, &got); err != nil || got.Version != 1 || got.Host.CPUs != 2 || !slices.Equal(got.Results, r.Results) {
		t.Errorf("%s: %v", raw, err)
	}
	if err := r.Write(""); err != nil {
		t.Error(err)
	}
}
