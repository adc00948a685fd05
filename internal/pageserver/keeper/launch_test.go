//go:build linux

package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/uffd/uffdtest"
	"fcvm/internal/vmm"
)

// handler is the program, built once.
var handler struct {
	sync.Once
	dir, path string
	err       error
}

func TestMain(m *testing.M) {
	pstest.Main()
	code := uffdtest.Main(m)
	if handler.dir != "" {
		_ = os.RemoveAll(handler.dir)
	}
	os.Exit(code)
}

// binary builds uffd_handler.
func binary(t testing.TB) string {
	t.Helper()
	handler.Do(func() {
		if handler.dir, handler.err = os.MkdirTemp("", "keeper"); handler.err != nil {
			return
		}
		handler.path = filepath.Join(handler.dir, "uffd_handler")
		cmd := exec.Command("go", "build", "-buildvcs=false", "-o", handler.path, "fcvm/cmd/uffd_handler")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			handler.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if errors.Is(handler.err, exec.ErrNotFound) {
		t.Skip("needs the go command")
	}
	if handler.err != nil {
		t.Fatal(handler.err)
	}
	return handler.path
}

const testPages = 1024

func testConfig(t testing.TB, policy pageserver.Policy) Config {
	t.Helper()
	uffdtest.Require(t)
	d, err := os.MkdirTemp("", "kp") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	c := Config{
		Binary: binary(t), Dir: d, Runtime: d, MemFile: filepath.Join(d, "mem.img"), Size: testPages * pstest.PageSize, Policy: policy,
	}
	if err := pstest.WriteSnapshot(c.MemFile, testPages); err != nil {
		t.Fatal(err)
	}
	return c
}

func start(t testing.TB, c Config) *Keeper {
	t.Helper()
	k, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(c.Dir, LogName))
			t.Logf("the page servers say:\n%s", log)
		}
		if err := k.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return k
}

func TestStartAndStop(t *testing.T) {
	c := testConfig(t, pageserver.PolicyShare)
	lease, err := os.Open(c.MemFile)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	c.Inherit = []*os.File{lease}
	k, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	st, err := k.Stats(t.Context())
	if err != nil || st.PID != k.PID() || st.MemBytes != c.Size {
		t.Errorf("%+v, %v", st, err)
	}
	template, err := k.Template()
	if err != nil {
		t.Fatal(err)
	}
	defer template.Close()
	if fi, err := template.Stat(); err != nil || fi.Size() != c.Size {
		t.Errorf("template: %+v, %v", fi, err)
	}
	if _, err := template.WriteAt([]byte{1}, 0); err == nil {
		t.Error("the template was opened for writing")
	}
	if n := opened(t, k.PID(), c.MemFile); n != 3 { // read, read directly, and the inherited one
		t.Errorf("it has the memory file open %d times", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Stats(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := k.Stats(t.Context()); err != nil {
		t.Errorf("after one that was called off: %v", err)
	}
	handle := k.Handle()
	if err := k.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(c.Runtime, "*.sock")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if _, err := Adopt(t.Context(), handle, nil, nil); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("adopting it again: %v", err)
	}
}

// opened counts the descriptors of a file in another process.
func opened(t *testing.T, pid int, path string) (n int) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if name, _ := os.Readlink(fd); name == path {
			n++
		}
	}
	return n
}

func TestStartFails(t *testing.T) {
	for _, c := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.MemFile = "/nonexistent" }, "open memory file: open /nonexistent"},
		{func(c *Config) { c.Size = 4096 }, "but the memory file 4194304"},
		{func(c *Config) { c.PageSums = c.MemFile }, "page sums are damaged"},
		{func(c *Config) { c.Binary = "/nonexistent" }, "no such file"},
		{func(c *Config) { c.Binary = "/bin/cat" }, "exit status 1"}, // never says that it is ready
	} {
		config := testConfig(t, pageserver.PolicyShare)
		c.change(&config)
		if _, err := Start(t.Context(), config); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
		if left, err := filepath.Glob(filepath.Join(config.Runtime, "*.sock")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// A page server that keeps dying is given up, with the reason.
func TestGivesUp(t *testing.T) {
	c := testConfig(t, pageserver.PolicyShare)
	k := start(t, c)
	if err := os.Remove(c.MemFile); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(k.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-k.Done()
	if err := k.Err(); err == nil || !strings.Contains(err.Error(), "open memory file") {
		t.Errorf("got %v", err)
	}
}
