//go:build linux

package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
	"fcvm/internal/uffd"
	"fcvm/internal/uffd/uffdtest"
)

// One server for a hundred clones that have each touched all of their memory, and
// given back half of it, stays within what the project promises (64 MiB).
func TestMemoryOfManySessions(t *testing.T) {
	uffdtest.Require(t)
	const (
		sessions = 100
		pages    = 64 << 20 / uffdtest.PageSize
		limit    = 48 << 10 // KiB
	)
	for _, policy := range []pageserver.Policy{pageserver.PolicyCopy, pageserver.PolicyShare} {
		t.Run(string(policy), func(t *testing.T) {
			d := dir(t)
			c := keeper.Config{
				Binary: program, Dir: d, Runtime: d, MemFile: filepath.Join(d, "mem.img"), Size: pages * uffdtest.PageSize, Policy: policy,
			}
			// Three windows in four are holes: the test's own memory is to be small, too.
			f, err := os.OpenFile(memFile(t, d, c.Size), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			for page := 0; page < pages; page += 64 {
				if _, err := f.WriteAt(bytes.Repeat([]byte{1}, uffdtest.PageSize), int64(page)*uffdtest.PageSize); err != nil {
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
			pidfd := vmm(t)
			for range sessions {
				session(t, p.Socket(), template, pidfd, pages)
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

// vmm is a process that stands for all VMMs.
func vmm(t *testing.T) (pidfd int) {
	t.Helper()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if pidfd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
		unix.Close(pidfd)
	})
	return pidfd
}

// session is a clone whose memory is the test's. It touches a page of each
// window, and gives back half of them.
func session(t *testing.T, socket string, template *os.File, pidfd, pages int) {
	t.Helper()
	mem := uffdtest.Map(t, pages, int(template.Fd()))
	fd := uffdtest.Open(t)
	addr := uffdtest.Address(mem)
	if _, err := fd.Register(addr, uint64(len(mem)), uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	err = fd.Use(func(n int) error {
		return pageserver.SendHandshake(conn, n, pidfd, []pageserver.Mapping{{Addr: addr, Size: uint64(len(mem))}})
	})
	if err != nil {
		t.Fatal(err)
	}
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	for page := 0; page < pages; page += 32 {
		// read(2) into the page: a write fault, taken by the kernel.
		if _, err := zero.Read(mem[page*uffdtest.PageSize : page*uffdtest.PageSize+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Madvise(mem[:len(mem)/2], unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}
