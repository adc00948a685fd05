//go:build linux

package pageserver

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"fcvm/internal/pageserver/pstest"
)

// Answering a fault allocates nothing: the collector has nothing to do, however
// many there are.
func TestNoAllocationPerFault(t *testing.T) {
	const pages = 16 << 20 / pageSize
	mem := filepath.Join(t.TempDir(), "mem.img")
	if err := os.WriteFile(mem, bytes.Repeat([]byte{1}, pages*pageSize), 0o600); err != nil {
		t.Fatal(err)
	}
	f := serve(t, Config{MemFile: mem, Policy: PolicyCopy, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	touch := pstest.Op{Kind: pstest.Read, Pages: pstest.Range(0, pages)}
	f.clone(t).do(t, touch) // buffers grow
	v := f.clone(t)
	v.do(t, pstest.Op{Kind: pstest.Sleep})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	v.do(t, touch)
	runtime.ReadMemStats(&after)
	faults := f.sessions(t, 2)[1].Faults
	if n := after.Mallocs - before.Mallocs; faults < pages || n > faults/10 {
		t.Errorf("%d allocations for %d faults", n, faults)
	}
}
