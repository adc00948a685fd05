// Package report is what benchmarks print and store: numbers, and of which machine
// they are.
package report

import (
	"encoding/json"
	"fmt"
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

// Percentile of values, by nearest rank; 0 of none.
func Percentile[T time.Duration | uint32 | float64](values []T, p float64) T {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	i := int(float64(len(s))*p/100+0.9999999) - 1
	return s[max(0, min(i, len(s)-1))]
}

// Millis is a duration in milliseconds.
func Millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
