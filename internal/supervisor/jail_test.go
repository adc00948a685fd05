package supervisor

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"fcvm/internal/api"
)

// envJailed makes the test binary a VMM that does nothing.
const envJailed = "FCVM_TEST_JAILED"

func init() {
	if os.Getenv(envJailed) != "" {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
}

func (b *bench) jailOf(id string) bool {
	b.t.Helper()
	_, err := os.Stat(filepath.Join(b.layout.VM(id), "jail"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.t.Error(err)
	}
	return err == nil
}

// A jail lives from a VM's start to its end, and no longer.
func TestJailEndsWithItsVM(t *testing.T) {
	b := newBench(t)
	vm, err := b.c.Run(t.Context(), api.RunRequest{
		Name: "golden", Image: "img", ImageID: "img", MemoryBytes: testMemory, CPUs: 1, Command: []string{"sleep"}, Engine: "fake", Jail: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if !vm.Jailed || !b.jailOf(vm.ID) {
		t.Errorf("not jailed: %+v", vm)
	}
	b.snapshot("golden", "snap")
	clones := b.clone(api.CloneRequest{Snapshot: "snap", Name: "web", Count: 2, Jail: true})
	for _, c := range clones {
		if !c.Jailed || !b.jailOf(c.ID) {
			t.Errorf("not jailed: %+v", c)
		}
	}
	// One that is not jailed must not be given a VMM that is, or the other way round.
	free := b.clone(api.CloneRequest{Snapshot: "snap", Name: "free", Count: 1})[0]
	if free.Jailed || b.jailOf(free.ID) {
		t.Errorf("jailed: %+v", free)
	}
	// Also one that ends while no supervisor runs.
	b.end()
	b.engine.byID(t, vm.ID).end()
	b.start()
	if _, err := b.c.Wait(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	if b.jailOf(vm.ID) {
		t.Error("the golden VM's jail is left")
	}
	if err := b.c.Kill(t.Context(), "web-1", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := b.c.Wait(t.Context(), "web-1"); err != nil {
		t.Fatal(err)
	}
	for _, c := range clones {
		if b.jailOf(c.ID) != (c.Name == "web-2") {
			t.Errorf("%s: a jail is %v", c.Name, b.jailOf(c.ID))
		}
	}
}

// What a start that was cut off left in a jail is found by its root.
func TestKillJailed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can jail")
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "jail", "firecracker", "id", "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "vmm"), self, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: "/vmm", Args: []string{"vmm"}, Dir: "/", Env: []string{envJailed + "=1"}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Skipf("needs a test binary without shared libraries: %v", err)
	}
	if err := killUsers(dir); err != nil {
		t.Error(err)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("it ended with %v", err)
	}
}
