// Package report is what benchmarks print and store: numbers, and of which machine
// they are.
package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"time"
)

// Report collects numbers. It is not safe for concurrent use.
type Report struct {
	Host    Host
	Results []Result
}

// Result is one measured number.
type Result struct {
	Section string  `json:"section"`
	Name    string  `json:"name"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit"`
}

// Note adds a number.
func (r *Report) Note(section, name string, value float64, unit string) {
	r.Results = append(r.Results, Result{section, name, value, unit})
}

// Write stores the numbers as JSON; with an empty path it does nothing.
func (r *Report) Write(path string) error {
	if path == "" {
		return nil
	}
	data, err := json.MarshalIndent(map[string]any{"version": 1, "host": r.Host, "results": r.Results}, "", "  ")
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return os.WriteFile(path, append(data, '\n'), 0o600)
}

// Percentiles of values, by nearest rank; 0 of none.
func Percentiles[T cmp.Ordered](values []T, ps ...float64) []T {
	sorted := slices.Clone(values)
	slices.Sort(sorted)
	out := make([]T, len(ps))
	for i, p := range ps {
		if n := len(sorted); n > 0 {
			rank := int(math.Ceil(float64(n) * p / 100))
			out[i] = sorted[max(0, min(rank, n)-1)]
		}
	}
	return out
}

// Percentile is one of them.
func Percentile[T cmp.Ordered](values []T, p float64) T { return Percentiles(values, p)[0] }

// Millis is a duration in milliseconds.
func Millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
