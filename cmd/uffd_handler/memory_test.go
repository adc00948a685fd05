//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/uffd/uffdtest"
)

// One server for a hundred clones that have each touched all of their memory, and
// given back half of it, stays within what the project promises (64 MiB).
func TestMemoryOfManySessions(t *testing.T) {
	uffdtest.Require(t)
	const (
		sessions = 100
		pages    = 64 << 20 / pstest.PageSize
		limit    = 48 << 10 // KiB
	)
	for _, policy := range []pageserver.Policy{pageserver.PolicyCopy, pageserver.PolicyShare} {
		t.Run(string(policy), func(t *testing.T) {
			d := dir(t)
			c := keeper.Config{
				Binary: program, Dir: d, Runtime: d, MemFile: filepath.Join(d, "mem.img"), Size: pages * pstest.PageSize, Policy: policy,
			}
			// Three windows in four are holes: the test's own memory is to be small, too.
			f, err := os.OpenFile(memFile(t, d, c.Size), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			for page := 0; page < pages; page += 64 {
				if _, err := f.WriteAt(bytes.Repeat([]byte{1}, pstest.PageSize), int64(page)*pstest.PageSize); err != nil {
					t.Fatal(err)
				}
			}
			f.Close()
			p, err := keeper.Start(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := p.Stop(t.Context()); err != nil {
					t.Error(err)
				}
			})
			template, err := p.Template()
			if err != nil {
				t.Fatal(err)
			}
			defer template.Close()
			for range sessions {
				session(t, p.Socket(), template, c.Size)
			}
			st, err := p.Stats(t.Context())
			if err != nil || len(st.Sessions) != sessions || len(st.Failures) != 0 {
				t.Fatalf("%d sessions, %+v, %v", len(st.Sessions), st.Failures, err)
			}
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
			if err != nil {
				t.Fatal(err)
			}
			var rss int
			for line := range strings.Lines(string(status)) {
				if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &rss); err == nil {
					break
				}
			}
			t.Logf("%d KiB at most for %d sessions and %d faults", rss, sessions, st.Faults)
			if rss == 0 || rss > limit {
				t.Errorf("the server held %d KiB, want at most %d", rss, limit)
			}
		})
	}
}

// session is a clone that has touched a page of each window, and given back half
// of them.
func session(t *testing.T, socket string, template *os.File, size int64) {
	t.Helper()
	v, err := pstest.StartVMM(t.Context(), pstest.Config{Shape: pstest.Template, Regions: []pstest.Region{{Size: size}}}, template)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Kill)
	if err := v.Connect(pstest.Handshake{Socket: socket}); err != nil {
		t.Fatal(err)
	}
	var touched []uint32
	for page := uint32(0); int64(page) < size/pstest.PageSize; page += 32 {
		touched = append(touched, page)
	}
	_, err = v.Run(pstest.Script{Threads: [][]pstest.Op{{
		{Kind: pstest.Write, Pages: pstest.Pages{List: touched}},
		{Kind: pstest.Remove, Pages: pstest.Range(0, int(size/pstest.PageSize/2))},
	}}})
	if err != nil {
		t.Fatal(err)
	}
}
