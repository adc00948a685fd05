//go:build linux && stress

package pstest

import (
	"os"
	"strconv"
	"testing"
	"time"
)

// TestStress is TestHistories at length: FCVM_STRESS_OPS operations for each setup
// (10 million). It needs -timeout.
func TestStress(t *testing.T) {
	ops := 10_000_000
	if s := os.Getenv("FCVM_STRESS_OPS"); s != "" {
		var err error
		if ops, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range setups(handler(t)) {
		t.Run(s.name, func(t *testing.T) {
			begin := time.Now()
			n, err := s.kit(t).Histories(t.Context(), ops)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d operations in %v", n, time.Since(begin).Round(time.Second))
		})
	}
}
