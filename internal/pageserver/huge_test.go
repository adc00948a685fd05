//go:build linux

package pageserver

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/vmm/hugepages"
	"fcvm/internal/workingset"
)

// Firecracker with huge pages: faults come for 2 MiB, and there is no zero page.
func TestHugePages(t *testing.T) {
	const pages, small = 3, hugePageSize / pageSize
	reserve(t, 2*pages)
	c := testConfig(t, PolicyCopy)
	hugeSnapshot(t, &c, pages)
	f := serve(t, c)
	v := hugeClone(t, f, pages)
	v.hasSnapshot(t, small+5, 7)
	v.hasZeros(t, pages*small-1)
	v.hasSnapshot(t, span(0, 2*small)...)
	v.hasZeros(t, span(2*small, 3*small)...)
	if st := f.sessions(t, 1)[0]; st.CopiedBytes != pages*hugePageSize || st.ZeroBytes != 0 {
		t.Errorf("%+v", st)
	}

	// They are no pages of a template.
	c.Policy, c.Template = PolicyShare, memfd(t)
	shared := serve(t, c)
	hugeClone(t, shared, pages).killed(t)
	if fail := shared.failure(t); !strings.Contains(fail.Reason, "cannot be shared") {
		t.Errorf("%+v", fail)
	}
}

// reserve has so many huge pages free until the test ends.
func reserve(t *testing.T, pages int) {
	t.Helper()
	release, err := pstest.ReserveHugePages(pages)
	if errors.Is(err, pstest.ErrSkip) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
}

// hugeSnapshot is one of so many huge pages: the last is zeros.
func hugeSnapshot(t *testing.T, c *Config, pages int) {
	t.Helper()
	c.MemFile = filepath.Join(t.TempDir(), "mem.img")
	if err := pstest.WriteSnapshot(c.MemFile, min(2, pages-1)*hugePageSize/pageSize); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(c.MemFile, int64(pages)*hugePageSize); err != nil {
		t.Fatal(err)
	}
}

// hugeClone is one of such a snapshot.
func hugeClone(t *testing.T, f *fixture, pages int) clone {
	t.Helper()
	v := f.vmm(t, pstest.Config{Shape: pstest.Anonymous, PageSize: hugePageSize, Regions: []pstest.Region{{Size: int64(pages) * hugePageSize}}})
	if err := v.Connect(pstest.Handshake{Socket: f.socket}); err != nil {
		t.Fatal(err)
	}
	return v
}

// A huge page of which any part is in the working set is there before it is asked for.
func TestReplayOfHugePages(t *testing.T) {
	const pages, small = 3, hugePageSize / pageSize
	reserve(t, 2*pages)
	c := testConfig(t, PolicyCopy)
	hugeSnapshot(t, &c, pages)
	c.ID, c.WorkingSet = workingset.ID{1}, filepath.Join(t.TempDir(), "workingset")
	set := workingset.New(c.ID, pages*small)
	for _, p := range []int64{small + 7, small + 9, 2*small + 1} {
		set.Add(p)
	}
	if err := os.WriteFile(c.WorkingSet, set.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
	f := serve(t, c)
	v := hugeClone(t, f, pages)
	eventually(t, func() ([]SessionStats, bool) {
		st := f.Stats().Sessions
		return st, len(st) == 1 && st[0].ReplayedBytes == 2*hugePageSize
	})
	v.hasSnapshot(t, span(small, 2*small)...)
	v.hasZeros(t, span(2*small, 3*small)...)
	if st := f.sessions(t, 1)[0]; st.Faults != 0 {
		t.Errorf("%d faults, want none", st.Faults)
	}
	v.discard(t, 2*small, small)
	v.hasZeros(t, 2*small, 3*small-1)
	v.hasSnapshot(t, 0, small-1)
	if st := f.sessions(t, 1)[0]; st.Faults != 2 {
		t.Errorf("%d faults, want 2", st.Faults)
	}
}

// A clone that needs one huge page more than there are is killed, with the reason: it
// must not wait for ever.
func TestNoHugePageIsFree(t *testing.T) {
	reserve(t, 2)
	pool, err := hugepages.Read("/")
	if err != nil {
		t.Fatal(err)
	}
	pages := pool.Free + 1
	c := testConfig(t, PolicyCopy)
	hugeSnapshot(t, &c, pages)
	f := serve(t, c)
	v := hugeClone(t, f, pages)
	for p := range pages - 1 {
		v.write(t, p*hugePageSize/pageSize)
	}
	v.begin(pstest.Op{Kind: pstest.Read, Pages: pstest.Page((pages - 1) * hugePageSize / pageSize)})
	v.killed(t)
	if fail := f.failure(t); fail.PID != v.PID() || !strings.Contains(fail.Reason, "no huge page") {
		t.Errorf("failure: %+v", fail)
	}
}

// Where a write to shared memory makes more than the page that was written, clones
// would read zeros: such a template is refused.
func TestTemplateOfHugePages(t *testing.T) {
	for _, kind := range []string{"always", "within_size"} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,huge="+kind); err != nil {
				t.Skipf("needs to mount a tmpfs with huge=%s: %v", kind, err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			})
			c := testConfig(t, PolicyShare)
			c.MemFile = filepath.Join(t.TempDir(), "mem.img")
			want := bytes.Repeat([]byte{7}, 8<<20)
			if err := os.WriteFile(c.MemFile, want, 0o600); err != nil {
				t.Fatal(err)
			}
			file, err := os.OpenFile(filepath.Join(dir, "template"), os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			c.Template = file
			s, err := New(c)
			if err != nil {
				if !strings.Contains(err.Error(), "uses huge pages") {
					t.Fatal(err)
				}
				t.Log("refused: ", err)
				return
			}
			// Linux 6.14 and later make pages of just the size that is written here.
			defer func() { _ = s.Close() }()
			buf := make([]byte, window)
			if _, err := s.template.need(3<<20+pageSize, buf, false); err != nil {
				t.Fatal(err)
			}
			checkHoles(t, s)
		})
	}
}

// checkHoles fails if the template has data where nothing was filled.
func checkHoles(t *testing.T, s *Server) {
	t.Helper()
	for page := range s.source.size / pageSize {
		at, err := unix.Seek(int(s.template.file.Fd()), page*pageSize, unix.SEEK_DATA)
		if has := err == nil && at == page*pageSize; has != s.template.filled.has(page) {
			t.Fatalf("page %d: in the template %v, filled %v", page, has, !has)
		}
	}
}
