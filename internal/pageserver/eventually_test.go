//go:build linux

package pageserver

import (
	"testing"
	"time"
)

// eventually asks until ok. The bound is for a test that would hang else, and
// far beyond what any of this takes.
func eventually[T any](t testing.TB, get func() (T, bool)) T {
	t.Helper()
	for range 20_000 {
		if v, ok := get(); ok {
			return v
		}
		time.Sleep(time.Millisecond)
	}
	v, _ := get()
	t.Fatalf("it did not happen; now: %+v", v)
	return v
}
