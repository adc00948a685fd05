//go:build linux

package pageserver

import (
	"errors"
	"os"
	"testing"
	"time"
)

// Peers that connect and say nothing keep nobody else out, however many they are, and
// those that came last may still speak.
func TestSilentConnectionsAreBounded(t *testing.T) {
	f := serve(t, testConfig(t, PolicyCopy))
	waiting := func(n int) {
		eventually(t, func() (int, bool) {
			f.reception.mu.Lock()
			defer f.reception.mu.Unlock()
			return len(f.reception.waiting), len(f.reception.waiting) == n
		})
	}
	first := f.dial(t)
	waiting(1)
	for range maxHandshakes - 1 {
		f.dial(t)
	}
	waiting(maxHandshakes)

	f.clone(t)
	eventually(t, func() (Stats, bool) { st := f.Stats(); return st, len(st.Sessions) == 1 && st.Refused == 1 })
	waiting(maxHandshakes - 1)
	if err := first.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := first.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest of those that say nothing: %d bytes, error %v, want an end", n, err)
	}
}
