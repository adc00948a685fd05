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
)

// Firecracker with huge pages: faults come for 2 MiB, and there is no zero page.
func TestHugePages(t *testing.T) {
	const pages, small = 3, hugePageSize / pageSize
	release, err := pstest.ReserveHugePages(2 * pages)
	if errors.Is(err, pstest.ErrSkip) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	c := testConfig(t, PolicyCopy)
	c.MemFile = filepath.Join(t.TempDir(), "mem.img")
	if err := pstest.WriteSnapshot(c.MemFile, 2*small); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(c.MemFile, pages*hugePageSize); err != nil { // the last one is zeros
		t.Fatal(err)
	}
	connect := func(f *fixture) clone {
		v := f.vmm(t, pstest.Config{Shape: pstest.Anonymous, PageSize: hugePageSize, Regions: []pstest.Region{{Size: pages * hugePageSize}}})
		if err := v.Connect(pstest.Handshake{Socket: f.socket}); err != nil {
			t.Fatal(err)
		}
		return v
	}
	f := serve(t, c)
	v := connect(f)
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
	connect(shared).killed(t)
	if fail := shared.failure(t); !strings.Contains(fail.Reason, "cannot be shared") {
		t.Errorf("%+v", fail)
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
