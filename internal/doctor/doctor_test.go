//go:build linux && amd64

package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/datadir"
	"fcvm/internal/guest"
	"fcvm/internal/uffd"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/firecracker/fcapi"
)

// good is a host where all is well. Tests break one thing each.
func good(t *testing.T) *host {
	t.Helper()
	h := &host{
		root: t.TempDir(), user: "ann", uid: 1000, dataDir: "/data", guestDir: "/data/guest", binDir: t.TempDir(),
		engine: func(context.Context) (vmm.Info, error) {
			return vmm.Info{Name: "qemu", Version: "7.2.22", Path: "/qemu", Accel: "kvm"}, nil
		},
		choose: func(context.Context) (vmm.Choice, error) {
			return vmm.Choice{
				Info:   vmm.Info{Name: "qemu", Version: "7.2.22", Accel: "kvm"},
				Passed: []vmm.Passed{{Name: "firecracker", Reason: "there is none"}},
			}, nil
		},
		jail: func() error { return nil },
		kvm:  func() error { return nil }, uffd: func() error { return nil }, attach: func() error { return nil },
		guest: func(string) (*guest.Assets, error) {
			return &guest.Assets{KernelVersion: "6.1.0", Source: "linux-image"}, nil
		},
		firecracker: func(context.Context) (firecracker.Program, error) {
			return firecracker.Program{Path: "/usr/bin/firecracker", Jailer: "/usr/bin/jailer", Version: fcapi.Version{Major: 1, Minor: 16, Patch: 1}}, nil
		},
		output: func(context.Context, string, ...string) ([]byte, error) {
			return []byte("Available netdev backend types:\nsocket\nuser\n"), nil
		},
		release:   func() string { return "6.18.44-cloud" },
		freeBytes: func(string) (int64, error) { return 100 * gib, nil },
	}
	h.put(t, "proc/meminfo", "MemTotal:  1 kB\nMemAvailable:   16777216 kB\n")
	h.put(t, "proc/sys/vm/overcommit_memory", "0\n")
	for _, name := range []string{"uffd_handler", "fcvm-init"} {
		if err := os.WriteFile(filepath.Join(h.binDir, name), nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) put(t *testing.T, path, content string) {
	t.Helper()
	path = filepath.Join(h.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// huge gives the host a pool of huge pages.
func (h *host) huge(t *testing.T, total, free string) {
	t.Helper()
	for name, n := range map[string]string{"nr": total, "free": free, "resv": "0"} {
		h.put(t, "sys/kernel/mm/hugepages/hugepages-2048kB/"+name+"_hugepages", n+"\n")
	}
}

func find(t *testing.T, r Report, name string) Check {
	t.Helper()
	for _, c := range r.Checks {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no check %q", name)
	return Check{}
}

func TestGoodHost(t *testing.T) {
	r := good(t).run(t.Context())
	if r.Failed() {
		t.Error("failed")
	}
	for _, c := range r.Checks {
		if c.Status != OK && c.Status != Info || c.Fix != nil || c.Detail == "" {
			t.Errorf("%+v", c)
		}
	}
}

func TestChecks(t *testing.T) {
	for name, c := range map[string]struct {
		harm   func(t *testing.T, h *host)
		check  string
		status Status
		detail string
		fix    string // part of one of the lines
	}{
		"old kernel":  {func(_ *testing.T, h *host) { h.release = func() string { return "5.10.0-30-amd64" } }, "kernel", Fail, "too old", "newer kernel"},
		"kernel 6.1":  {func(_ *testing.T, h *host) { h.release = func() string { return "6.1.0" } }, "kernel", OK, "PAGEMAP_SCAN", ""},
		"kernel 5.15": {func(_ *testing.T, h *host) { h.release = func() string { return "5.15" } }, "kernel", OK, "/dev/userfaultfd", ""},
		"strange":     {func(_ *testing.T, h *host) { h.release = func() string { return "x" } }, "kernel", Warn, "cannot tell", ""},
		"no handler":  {func(t *testing.T, h *host) { os.Remove(filepath.Join(h.binDir, "uffd_handler")) }, "programs", Fail, "uffd_handler must be beside fcvm", "make build"},
		"no guest": {func(_ *testing.T, h *host) {
			h.guest = func(string) (*guest.Assets, error) { return nil, guest.ErrNotSetUp }
		}, "guest", Fail, "/data/guest", "fcvm setup"},
		"guest damaged": {func(_ *testing.T, h *host) {
			h.guest = func(string) (*guest.Assets, error) { return nil, errors.New("bad digest") }
		}, "guest", Fail, "bad digest", "fcvm setup"},
		"no qemu, but firecracker": {func(_ *testing.T, h *host) {
			h.engine = func(context.Context) (vmm.Info, error) { return vmm.Info{}, vmm.ErrUnavailable }
		}, "qemu", Info, "not available", "apt install qemu-system-x86"},
		"no qemu": {func(_ *testing.T, h *host) {
			h.engine = func(context.Context) (vmm.Info, error) { return vmm.Info{}, vmm.ErrUnavailable }
			h.choose = func(context.Context) (vmm.Choice, error) { return vmm.Choice{}, vmm.ErrUnavailable }
		}, "qemu", Fail, "not available", "apt install qemu-system-x86"},
		"no slirp": {func(_ *testing.T, h *host) {
			h.output = func(context.Context, string, ...string) ([]byte, error) { return []byte("socket\nuserland\n"), nil }
		}, "network", Fail, "libslirp", "slirp"},
		"no kvm permission": {func(_ *testing.T, h *host) { h.kvm = func() error { return fmt.Errorf("open: %w", fs.ErrPermission) } }, "kvm", Warn, "TCG", "usermod -aG kvm ann"},
		"no kvm module": {func(t *testing.T, h *host) {
			h.kvm = func() error { return fs.ErrNotExist }
			h.put(t, "proc/cpuinfo", "flags\t\t: fpu svm\n")
		}, "kvm", Warn, "TCG", "modprobe kvm_amd"},
		"kvm paravirtual": {func(t *testing.T, h *host) {
			h.kvm = func() error { return errors.New("neither svm nor vmx") }
			h.put(t, "proc/cpuinfo", "processor: 0\nflags\t\t: fpu hypervisor sse\n")
		}, "kvm", Warn, "neither svm nor vmx", "nested=1"},
		"kvm off":     {func(_ *testing.T, h *host) { h.kvm = func() error { return errors.New("neither") } }, "kvm", Warn, "TCG", "firmware"},
		"firecracker": {func(*testing.T, *host) {}, "firecracker", Info, "Firecracker 1.16.1 at /usr/bin/firecracker", ""},
		"choice":      {func(*testing.T, *host) {}, "engine", OK, "VMs run on qemu 7.2.22 with kvm, unless --engine says otherwise (not firecracker: there is none)", ""},
		"no engine": {func(_ *testing.T, h *host) {
			h.choose = func(context.Context) (vmm.Choice, error) {
				return vmm.Choice{Passed: []vmm.Passed{{Name: "firecracker", Reason: "no KVM"}, {Name: "qemu", Reason: "install it"}}}, vmm.ErrUnavailable
			}
		}, "engine", Fail, "firecracker: no KVM; qemu: install it", "QEMU"},
		"no firecracker": {func(_ *testing.T, h *host) {
			h.firecracker = func(context.Context) (firecracker.Program, error) {
				return firecracker.Program{}, firecracker.ErrNotFound
			}
		}, "firecracker", Info, "not needed", "fcvm setup --engine firecracker"},
		"old firecracker": {func(_ *testing.T, h *host) {
			h.firecracker = func(context.Context) (firecracker.Program, error) {
				return firecracker.Program{}, errors.New("version 1.7.0 is too old")
			}
		}, "firecracker", Info, "too old", ""},
		"no jailer": {func(_ *testing.T, h *host) {
			h.firecracker = func(context.Context) (firecracker.Program, error) { return firecracker.Program{Path: "/fc"}, nil }
		}, "firecracker", Info, "without a jailer", ""},
		"userfaultfd device closed": {func(t *testing.T, h *host) {
			h.uffd = func() error { return uffd.ErrNotPermitted }
			h.put(t, uffd.Device, "")
		}, "userfaultfd", Warn, "ann may not open /dev/userfaultfd", "setfacl -m u:ann:rw /dev/userfaultfd"},
		"userfaultfd sysctl":  {func(_ *testing.T, h *host) { h.uffd = func() error { return uffd.ErrNotPermitted } }, "userfaultfd", Warn, "ann", "vm.unprivileged_userfaultfd=1"},
		"no userfaultfd":      {func(_ *testing.T, h *host) { h.uffd = func() error { return unix.ENOSYS } }, "userfaultfd", Warn, "no userfaultfd", "CONFIG_USERFAULTFD"},
		"ptrace in container": {func(_ *testing.T, h *host) { h.attach = func() error { return unix.EPERM } }, "ptrace", Warn, "--mem-backend file", "--cap-add SYS_PTRACE"},
		"ptrace and yama": {func(t *testing.T, h *host) {
			h.attach = func() error { return unix.EPERM }
			h.put(t, "proc/sys/kernel/yama/ptrace_scope", "2\n")
		}, "ptrace", Warn, "--mem-backend file", "kernel.yama.ptrace_scope=1"},
		"yama":          {func(t *testing.T, h *host) { h.put(t, "proc/sys/kernel/yama/ptrace_scope", "1\n") }, "yama", Warn, "ptrace_scope is 1", "ptrace_scope=0"},
		"yama and root": {func(t *testing.T, h *host) { h.tracer = true; h.put(t, "proc/sys/kernel/yama/ptrace_scope", "1\n") }, "yama", OK, "", ""},
		"ksm on":        {func(t *testing.T, h *host) { h.put(t, "sys/kernel/mm/ksm/run", "1\n") }, "ksm", Info, "on: ", ""},
		"no huge pages": {func(t *testing.T, h *host) { h.huge(t, "0", "0") }, "hugepages", Info, "none of 2 MiB", ""},
		"huge pages":    {func(t *testing.T, h *host) { h.huge(t, "12", "7") }, "hugepages", Info, "7 of 12", ""},
		"ksm off":       {func(t *testing.T, h *host) { h.put(t, "sys/kernel/mm/ksm/run", "0\n") }, "ksm", Info, "off; ", ""},
		"little memory": {func(t *testing.T, h *host) { h.put(t, "proc/meminfo", "MemAvailable: 524288 kB\n") }, "memory", Warn, "512 MiB", ""},
		"no memory":     {func(t *testing.T, h *host) { h.put(t, "proc/meminfo", "MemAvailable: 100000 kB\n") }, "memory", Fail, "97 MiB", "stop"},
		"odd meminfo":   {func(t *testing.T, h *host) { h.put(t, "proc/meminfo", "MemAvailable: -1 kB\n") }, "memory", Warn, "cannot tell", ""},
		"overcommit":    {func(t *testing.T, h *host) { h.put(t, "proc/sys/vm/overcommit_memory", "2\n") }, "overcommit", Warn, "reserves", "overcommit_memory=0"},
		"little disk":   {func(_ *testing.T, h *host) { h.freeBytes = func(string) (int64, error) { return gib, nil } }, "disk", Warn, "1024 MiB free in /data", "snapshot rm"},
		"disk full":     {func(_ *testing.T, h *host) { h.freeBytes = func(string) (int64, error) { return 0, nil } }, "disk", Fail, "0 MiB free in /data", "snapshot rm"},
		"no data dir":   {func(_ *testing.T, h *host) { h.freeBytes = func(string) (int64, error) { return 0, fs.ErrNotExist } }, "disk", Fail, "/data", "--data-dir"},
	} {
		t.Run(name, func(t *testing.T) {
			h := good(t)
			c.harm(t, h)
			r := h.run(t.Context())
			got := find(t, r, c.check)
			if got.Status != c.status || !strings.Contains(got.Detail, c.detail) {
				t.Errorf("got %+v", got)
			}
			if fix := strings.Join(got.Fix, "\n"); !strings.Contains(fix, c.fix) || (c.fix == "" && c.status == OK && fix != "") {
				t.Errorf("fix is %q", fix)
			}
			if r.Failed() != (c.status == Fail) {
				t.Errorf("Failed() is %v", r.Failed())
			}
		})
	}
}

// TestThisHost looks at the host that the test runs on, whatever it is.
func TestThisHost(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	l, err := datadir.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(l.Runtime) })
	r := Run(t.Context(), l)
	for _, c := range r.Checks {
		t.Logf("%-4s %-12s %s\n\t%s", c.Status, c.Name, c.Detail, strings.Join(c.Fix, "\n\t"))
		if c.Name == "" || c.Status == "" || c.Detail == "" {
			t.Errorf("%+v", c)
		}
		if c.Status == Fail && c.Fix == nil {
			t.Errorf("%s fails, and nothing says what to do", c.Name)
		}
	}
	// A new data directory has no guest.
	if c := find(t, r, "guest"); c.Status != Fail || !r.Failed() {
		t.Errorf("got %+v", c)
	}
	b, err := json.Marshal(r)
	if err != nil || !bytes.HasPrefix(b, []byte(`{"version":1,"checks":[{"name":"kernel","status":`)) {
		t.Errorf("JSON is %s, %v", b, err)
	}
}

func FuzzMemAvailable(f *testing.F) {
	f.Add([]byte("MemTotal: 1 kB\nMemAvailable: 12 kB\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := memAvailable(bytes.NewReader(b)); err == nil && n < 0 {
			t.Errorf("%d bytes", n)
		}
	})
}
