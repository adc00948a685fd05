//go:build linux

package pageserver

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/uffdtest"
)

// Firecracker with huge pages: faults come for 2 MiB, and there is no zero page.
func TestHugePages(t *testing.T) {
	const pages = 3
	mem, err := unix.Mmap(-1, 0, pages*hugePageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB)
	if err != nil {
		t.Skipf("needs %d reserved huge pages (/proc/sys/vm/nr_hugepages): %v", pages, err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	c := testConfig(t, PolicyCopy)
	c.MemFile = filepath.Join(t.TempDir(), "mem.img")
	want := make([]byte, pages*hugePageSize) // the last one stays zeros
	copy(want, bytes.Repeat([]byte{1}, hugePageSize))
	copy(want[hugePageSize:], bytes.Repeat([]byte{2}, 100))
	if err := os.WriteFile(c.MemFile, want, 0o600); err != nil {
		t.Fatal(err)
	}
	f := serve(t, c)
	m, fd := newStand(t), uffdtest.Open(t)
	addr := uffdtest.Address(mem)
	if _, err := fd.Register(addr, uint64(len(mem)), uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	mappings := []Mapping{{Addr: addr, Size: uint64(len(mem)), PageSize: hugePageSize}}
	handOver := func(f *fixture) {
		conn := f.dial(t)
		if err := fd.Use(func(n int) error { return SendHandshake(conn, n, m.pidfd, mappings) }); err != nil {
			t.Fatal(err)
		}
	}
	handOver(f)
	for _, at := range []int{hugePageSize + 5*pageSize, 7, 3*hugePageSize - 1} {
		<-uffdtest.Touch(t, mem, at, false)
	}
	if !bytes.Equal(mem, want) {
		t.Error("memory differs from the file")
	}
	if st := f.sessions(t, 1)[0]; st.CopiedBytes != pages*hugePageSize || st.ZeroBytes != 0 {
		t.Errorf("%+v", st)
	}
	if err := f.end(); err != nil {
		t.Fatal(err)
	}

	// They are no pages of a template.
	c.Policy, c.Template = PolicyShare, memfd(t)
	shared := serve(t, c)
	handOver(shared)
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
