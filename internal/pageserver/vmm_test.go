//go:build linux

package pageserver

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd/attach"
	"fcvm/internal/uffd/uffdtest"
)

// fakeVMM is a process whose memory is served.
type fakeVMM struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// startVMM starts one of the shapes that child_test.go describes.
func (f *fixture) startVMM(t testing.TB, shape string) *fakeVMM {
	t.Helper()
	uffdtest.Require(t)
	v := &fakeVMM{}
	var start func() error
	switch shape {
	case "firecracker":
		v.cmd = childCommand(shape, f.socket)
		v.cmd.Env = append(v.cmd.Env, fmt.Sprintf("%s=%d", envGuest, f.source.size))
		start = func() error { return v.cmd.Start() }
	case "attached":
		if err := attach.Probe(); err != nil {
			t.Skipf("needs ptrace: %v", err)
		}
		v.cmd = childCommand(shape)
		start = func() error { return f.attach(t, v.cmd) }
	}
	stdin, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	v.in, v.out = in, bufio.NewScanner(out)
	v.cmd.Stdin, v.cmd.Stdout, v.cmd.Stderr = stdin, stdout, os.Stderr
	err = start()
	stdin.Close()
	stdout.Close()
	t.Cleanup(func() { in.Close(); out.Close() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = v.cmd.Process.Kill()
		_ = v.cmd.Wait()
	})
	if got := v.line(t); !strings.HasPrefix(got, "base ") {
		t.Fatalf("VMM says %q", got)
	}
	return v
}

// attach is what an engine does for a VMM that it attaches to.
func (f *fixture) attach(t testing.TB, cmd *exec.Cmd) error {
	conn := f.dial(t)
	inherited, err := conn.File()
	if err != nil {
		return err
	}
	defer inherited.Close()
	cmd.ExtraFiles = []*os.File{inherited}
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	// A clone maps a read-only description of the template.
	template, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.config.Template.Fd()))
	if err != nil {
		return err
	}
	defer template.Close()
	size := f.source.size
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", envGuest, size))
	a, err := attach.Start(t.Context(), cmd, attach.Config{Size: size, File: template, Userfault: true})
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	defer a.UFFD.Close()
	defer conn.Close()
	return a.UFFD.Use(func(fd int) error {
		return SendHandshake(conn, fd, pidfd, []Mapping{{Addr: a.Addr, Size: uint64(size)}})
	})
}

func (v *fakeVMM) line(t testing.TB) string {
	t.Helper()
	if !v.out.Scan() {
		t.Fatalf("VMM ended: %v", v.out.Err())
	}
	return v.out.Text()
}

func (v *fakeVMM) ask(t testing.TB, command string) string {
	t.Helper()
	if _, err := fmt.Fprintln(v.in, command); err != nil {
		t.Fatal(err)
	}
	return v.line(t)
}

// shapes runs a test for each kind of VMM with each policy. A template that is
// only mapped, and stays empty, goes with policy copy.
func shapes(t *testing.T, test func(t *testing.T, f *fixture, held *heldFile, shape string)) {
	for _, shape := range []string{"firecracker", "attached"} {
		for _, p := range []Policy{PolicyCopy, PolicyShare} {
			t.Run(shape+"/"+string(p), func(t *testing.T) {
				c := testConfig(t, p)
				if c.Template == nil {
					c.Template = memfd(t)
					if err := c.Template.Truncate(guestSize); err != nil {
						t.Fatal(err)
					}
				}
				f, held := serveHeld(t, c)
				test(t, f, held, shape)
			})
		}
	}
}

func TestVMMReadsItsSnapshot(t *testing.T) {
	shapes(t, func(t *testing.T, f *fixture, _ *heldFile, shape string) {
		a, b := f.startVMM(t, shape), f.startVMM(t, shape)
		for _, v := range []*fakeVMM{a, b} {
			if got := v.ask(t, "check"); got != "bad []" {
				t.Errorf("check: %s", got)
			}
		}
		// Nobody sees the other's write.
		a.ask(t, "w 9")
		if got := a.ask(t, "check"); got != "bad [9]" {
			t.Errorf("after a write: %s", got)
		}
		if got := b.ask(t, "check"); got != "bad []" {
			t.Errorf("the other's: %s", got)
		}
		if got := f.startVMM(t, shape).ask(t, "check"); got != "bad []" {
			t.Errorf("a later one's: %s", got)
		}
		t.Logf("%+v", f.Stats())
	})
}

// Reads, writes and pages given back by several threads of several VMMs at once.
func TestRemoveRaces(t *testing.T) {
	rounds := 3000
	if testing.Short() {
		rounds = 300
	}
	shapes(t, func(t *testing.T, f *fixture, _ *heldFile, shape string) {
		vmms := []*fakeVMM{f.startVMM(t, shape), f.startVMM(t, shape)}
		var wg sync.WaitGroup
		for _, v := range vmms {
			wg.Go(func() {
				if _, err := fmt.Fprintf(v.in, "race %d\n", rounds); err != nil {
					t.Error(err)
				} else if !v.out.Scan() || v.out.Text() != "fine" {
					t.Errorf("race: %q", v.out.Text())
				}
			})
		}
		wg.Wait()
		for _, s := range f.sessions(t, 2) {
			t.Logf("%+v", s)
			if s.RemovedBytes == 0 {
				t.Error("nothing was given back")
			}
		}
	})
}

// A VMM that ends while its faults are read for takes nothing with it.
func TestVMMKilledInFault(t *testing.T) {
	shapes(t, func(t *testing.T, f *fixture, held *heldFile, shape string) {
		v, other := f.startVMM(t, shape), f.startVMM(t, shape)
		f.sessions(t, 2)
		held.holding.Store(true)
		if got := v.ask(t, "fault 200"); got != "ok" {
			t.Fatal(got)
		}
		<-held.reading
		if err := v.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := v.cmd.Process.Wait(); err != nil {
			t.Fatal(err)
		}
		held.letGo()
		f.sessions(t, 1)
		if st := f.Stats(); len(st.Failures) != 0 {
			t.Errorf("%+v", st.Failures)
		}
		if got := other.ask(t, "check"); got != "bad []" {
			t.Errorf("the other VMM: %s", got)
		}
	})
}

// A fault that cannot be served kills the VMM that is the connection's peer.
func TestFailureKillsVMM(t *testing.T) {
	shapes(t, func(t *testing.T, f *fixture, _ *heldFile, shape string) {
		v := f.startVMM(t, shape)
		if err := os.Truncate(f.config.MemFile, 64*pageSize); err != nil {
			t.Fatal(err)
		}
		v.ask(t, "fault 200")
		if v.out.Scan() {
			t.Fatalf("it read %s", v.out.Text())
		}
		state, err := v.cmd.Process.Wait()
		if err != nil || !strings.Contains(state.String(), "killed") {
			t.Errorf("VMM: %s, %v", state, err)
		}
		if fail := f.failure(t); fail.PID != v.cmd.Process.Pid {
			t.Errorf("%+v", fail)
		}
		f.sessions(t, 0)
	})
}

func TestManySessions(t *testing.T) {
	const many = 30
	f := serve(t, testConfig(t, PolicyShare))
	var vmms []*fakeVMM
	for range many {
		vmms = append(vmms, f.startVMM(t, "attached"))
	}
	f.sessions(t, many)
	var wg sync.WaitGroup
	for _, v := range vmms {
		wg.Go(func() {
			if _, err := fmt.Fprintln(v.in, "check"); err != nil {
				t.Error(err)
			} else if !v.out.Scan() || v.out.Text() != "bad []" {
				t.Errorf("check: %q", v.out.Text())
			}
		})
	}
	wg.Wait()
	for _, v := range vmms {
		v.in.Close()
	}
	f.sessions(t, 0)
	if st := f.Stats(); st.Ended != many || len(st.Failures) != 0 {
		t.Errorf("%+v", st)
	}
}
