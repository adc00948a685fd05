package vmmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"fcvm/internal/guest"
	"fcvm/internal/image/erofs"
	"fcvm/internal/testreport"
	"fcvm/internal/vmm"
)

// EnvGuest names a directory that [guest.Setup] filled, or shall fill.
const EnvGuest = "FCVM_TEST_GUEST"

// EnvBin names a directory with fcvm-init, uffd_handler and probe, which are built
// otherwise. In a lab that is itself emulated, building takes longer than the suite.
const EnvBin = "FCVM_VMMTEST_BIN"

// memoryBytes of the suite's guests: little, so that copying it costs little.
const memoryBytes = 192 << 20

// patience bounds every wait for a guest. On a loaded machine without KVM a boot
// takes tens of seconds.
const patience = 2 * time.Minute

// lab is what the tests share.
type lab struct {
	newEngine New
	engine    vmm.Engine
	dir       string // short, for the sake of sockets
	assets    *guest.Assets
	machine   vmm.Machine
	bin       string // directory of the programs under test
	noNetwork bool
	network   vmm.Network // of all VMs; empty means the engine's own choice
	// removeJail is nil for VMs without one.
	removeJail func(dir string) error
	// dumper is nil for an engine that cannot write all memory by itself.
	dumper Dumper

	suite string        // its name in reports
	info  vmm.Info      // of the engine
	vms   *atomic.Int64 // started so far

	golden   *started
	snapshot *snapshot
}

func newLab(t testing.TB, newEngine New, options ...Option) *lab {
	t.Helper()
	if testing.Short() {
		t.Skip("real guests take longer than -short allows")
	}
	l := &lab{newEngine: newEngine, engine: newEngine(), suite: "engines' suite", vms: new(atomic.Int64)}
	for _, o := range options {
		o(l)
	}
	want := os.Getenv(testreport.EnvAccel)
	info, err := l.engine.Info(t.Context())
	switch {
	case errors.Is(err, vmm.ErrUnavailable) && want == "":
		t.Skip(err)
	case err != nil:
		t.Fatal(err)
	case want != "" && want != info.Accel:
		t.Fatalf("the accelerator is %s, and %s=%s", info.Accel, testreport.EnvAccel, want)
	}
	l.info = info
	l.dir = shortDir(t)
	l.bin = filepath.Join(l.dir, "bin")
	if dir := os.Getenv(EnvBin); dir != "" {
		l.bin = dir
	} else {
		l.build(t, "fcvm/cmd/fcvm-init", "fcvm/cmd/uffd_handler", "fcvm/internal/vmm/vmmtest/probe")
	}
	l.assets = l.setUpGuest(t)
	l.machine = vmm.Machine{MemoryBytes: memoryBytes, CPUs: 1, RootFS: filepath.Join(l.dir, "rootfs.erofs"), Network: l.network}
	if err := writeRootFS(l.machine.RootFS, filepath.Join(l.bin, "probe")); err != nil {
		t.Fatal(err)
	}
	return l
}

// report tells what a test was run on.
func (l *lab) report(t *testing.T, name string, vms int, took time.Duration) {
	err := testreport.Append(testreport.Entry{
		Suite: l.suite, Test: name, Engine: l.info.Name, Version: l.info.Version, Accel: l.info.Accel,
		Outcome: testreport.Of(t), VMs: vms, Seconds: took.Seconds(),
	})
	if err != nil {
		t.Error(err)
	}
}

func (l *lab) build(t testing.TB, packages ...string) {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("no go command here to build the guest's programs with")
	}
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", l.bin + "/"}, packages...)
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v\n%s", args, err, out)
	}
}

// setUpGuest keeps the kernel from one run to the next, since it is downloaded.
func (l *lab) setUpGuest(t testing.TB) *guest.Assets {
	t.Helper()
	dir := os.Getenv(EnvGuest)
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Skipf("no place for the guest's kernel: %v; set %s", err, EnvGuest)
		}
		dir = filepath.Join(cache, "fcvm-test", "guest")
	}
	_, notThere := guest.Open(dir)
	a, err := guest.Setup(t.Context(), guest.SetupOptions{Dir: dir, InitBinary: filepath.Join(l.bin, "fcvm-init")})
	if err != nil && notThere != nil {
		t.Skipf("no guest kernel: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	// Another setup may replace and remove them while the suite runs.
	own := *a
	own.Kernel, own.Initrd = filepath.Join(l.dir, "kernel"), filepath.Join(l.dir, "initrd")
	for from, to := range map[string]string{a.Kernel: own.Kernel, a.Initrd: own.Initrd} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &own
}

// shortDir is like t.TempDir, but short enough for a socket in a directory of it.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// place makes directories for one VM, and checks at the end that no process
// still uses them.
func (l *lab) place(t testing.TB, id string) vmm.Place {
	t.Helper()
	base, err := os.MkdirTemp(l.dir, id+"-")
	if err != nil {
		t.Fatal(err)
	}
	p := vmm.Place{ID: filepath.Base(base), Dir: filepath.Join(base, "d"), Runtime: filepath.Join(base, "r"), Jail: l.removeJail != nil}
	for _, d := range []string{p.Dir, p.Runtime} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if left := processes(p); len(left) > 0 {
			t.Errorf("processes left behind: %v", left)
		}
		if p.Jail {
			// What the VM made on the host ends with it.
			if err := l.removeJail(p.Dir); err != nil {
				t.Error(err)
			}
			if left, err := filepath.Glob("/sys/fs/cgroup/*/" + p.ID); err != nil || len(left) > 0 {
				t.Errorf("cgroups left behind: %v, %v", left, err)
			}
		}
	})
	return p
}

// nothingLeft checks that a start which failed has cleaned up.
func nothingLeft(t testing.TB, p vmm.Place) {
	t.Helper()
	if left := processes(p); len(left) > 0 {
		t.Errorf("processes left behind: %v", left)
	}
	entries, err := os.ReadDir(p.Runtime)
	if err != nil {
		t.Error(err)
	}
	if exists(filepath.Join(p.Dir, "jail")) {
		t.Error("the jail was left behind")
	}
	for _, e := range entries {
		t.Errorf("left in the runtime directory: %s", e.Name())
	}
}

// processes finds the living processes whose command line names the place.
func processes(p vmm.Place) []int {
	var found []int
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		// A zombie's is empty, one that just ended is gone.
		b, err := os.ReadFile(f)
		named := bytes.Contains(b, []byte(p.Dir)) || p.Jail && bytes.Contains(b, []byte("\x00"+p.ID+"\x00"))
		if err != nil || !named {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil && pid != os.Getpid() {
			found = append(found, pid)
		}
	}
	return found
}

// writeRootFS makes the guest's file system: one program.
func writeRootFS(path, program string) (err error) {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	spool, err := os.CreateTemp(filepath.Dir(path), "spool")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, spool.Close(), os.Remove(spool.Name())) }()
	in, err := os.Open(program)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	w := erofs.NewWriter(out, spool)
	data, err := w.Append(in, info.Size(), nil)
	if err != nil {
		return fmt.Errorf("write root file system: %w", err)
	}
	directory := func() *erofs.Inode { return &erofs.Inode{Mode: erofs.ModeDir | 0o755} }
	root := directory()
	root.Entries = append(root.Entries, erofs.Entry{Name: "probe", Inode: &erofs.Inode{Mode: erofs.ModeFile | 0o755, Data: data}})
	for _, name := range []string{"dev", "etc", "proc", "run", "sys", "tmp"} {
		root.Entries = append(root.Entries, erofs.Entry{Name: name, Inode: directory()})
	}
	if _, err := w.Finish(root); err != nil {
		return fmt.Errorf("write root file system: %w", err)
	}
	return nil
}

// within bounds ctx by [patience].
func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
