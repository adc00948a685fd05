//go:build linux && amd64

package attach_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/uffd/uffdtest"
)

const qemuMemory = 64 << 20

// qemu is an unmodified QEMU with all of its sandbox, that waits for a migration.
func qemu(t testing.TB) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64")
	}
	return exec.Command(path, "-M", "microvm,accel=tcg,memory-backend=ram", "-m", fmt.Sprint(qemuMemory>>20),
		"-object", fmt.Sprintf("memory-backend-ram,id=ram,size=%d", qemuMemory),
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-nodefaults", "-no-user-config", "-display", "none", "-S", "-incoming", "defer", "-qmp", "stdio")
}

// startQEMU returns when its monitor greets, and ends it with the test.
func startQEMU(t testing.TB, cmd *exec.Cmd, start func() error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	hold, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	t.Cleanup(func() { in.Close() })
	cmd.Stdin, cmd.Stdout, cmd.Stderr = hold, w, os.Stderr
	if err := start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	w.Close()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || !strings.Contains(line, "QMP") {
		t.Fatalf("QEMU greets with %q, %v", line, err)
	}
}

func TestQEMU(t *testing.T) {
	uffdtest.Require(t)
	if err := attach.Probe(); err != nil {
		t.Skipf("needs ptrace: %v", err)
	}
	file := sparse(t)
	cmd := qemu(t)
	var a *attach.Attached
	startQEMU(t, cmd, func() (err error) {
		a, err = attach.Start(t.Context(), cmd, attach.Config{Size: qemuMemory, File: file, Userfault: true})
		return err
	})
	defer a.UFFD.Close()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x-%x rw-p 00000000", a.Addr, a.Addr+qemuMemory)
	var found bool
	for line := range strings.Lines(string(maps)) {
		found = found || strings.HasPrefix(line, want) && strings.Contains(line, "memfd:guest")
	}
	if !found {
		t.Errorf("no mapping %s of the file in\n%s", want, maps)
	}
	// Nobody touched guest memory yet, and what is put there lands.
	var buf uffd.Buffer
	if ev, err := a.UFFD.ReadEvents(&buf); err != nil || len(ev) != 0 {
		t.Errorf("got %+v, %v", ev, err)
	}
	if _, err := a.UFFD.Copy(a.Addr, make([]byte, page)); err != nil {
		t.Error(err)
	}
	if _, err := a.UFFD.Copy(a.Addr, make([]byte, page)); !errors.Is(err, uffd.ErrExist) {
		t.Error(err)
	}
}

func sparse(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(qemuMemory); err != nil {
		t.Fatal(err)
	}
	return f
}

// BenchmarkQEMU prints what attaching costs, from exec to QEMU's greeting.
func BenchmarkQEMU(b *testing.B) {
	for _, how := range []string{"bare", "attached"} {
		b.Run(how, func(b *testing.B) {
			if err := attach.Probe(); err != nil {
				b.Skipf("needs ptrace: %v", err)
			}
			uffdtest.Require(b)
			file := sparse(b)
			for b.Loop() {
				cmd := qemu(b)
				startQEMU(b, cmd, func() error {
					if how == "bare" {
						return cmd.Start()
					}
					a, err := attach.Start(b.Context(), cmd, attach.Config{Size: qemuMemory, File: file, Userfault: true})
					if err == nil {
						a.UFFD.Close()
					}
					return err
				})
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
		})
	}
}
