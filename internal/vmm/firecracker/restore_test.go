package firecracker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fcvm/internal/network/tapnet"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/uffd/uffdtest"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
)

// fakeLab has what clones need of a host, and a fake Firecracker.
type fakeLab struct {
	engine vmm.Engine
	dir    string
	mem    string // memory file: page i holds byte i&0xff, but odd multiples of 16 are holes
	state  string
	rootfs string
	jailed bool
	// network of the VMs; empty for none.
	network vmm.Network
}

// newFakeLab makes the fake fail where failing says.
func newFakeLab(t *testing.T, failing string, o firecracker.Options) *fakeLab {
	t.Helper()
	dir, err := os.MkdirTemp("", "ff") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l := &fakeLab{dir: dir, mem: filepath.Join(dir, "mem"), state: filepath.Join(dir, "state"), rootfs: filepath.Join(dir, "rootfs")}
	var mem []byte
	for i := range fakeSize / 4096 {
		mem = append(mem, bytes.Repeat([]byte{content(i)}, 4096)...)
	}
	script := fmt.Sprintf("#!/bin/sh\n%s='%s' exec '%s' \"$@\"\n", envFake, failing, self(t))
	for path, b := range map[string][]byte{l.mem: mem, l.state: []byte("state"), l.rootfs: nil, filepath.Join(dir, "firecracker"): []byte(script)} {
		if err := os.WriteFile(path, b, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	o.Binary = filepath.Join(dir, "firecracker")
	l.engine = firecracker.NewFake(o)
	return l
}

// buildHandler builds the page server.
func buildHandler(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "uffd_handler")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, "fcvm/cmd/uffd_handler")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build uffd_handler: %v\n%s", err, out)
	}
	return path
}

func content(page int) byte {
	if page/16%2 == 1 {
		return 0
	}
	return byte(page) | 1
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func (l *fakeLab) config(t *testing.T, m vmm.Memory) vmm.RestoreConfig {
	t.Helper()
	base, err := os.MkdirTemp(l.dir, "vm")
	if err != nil {
		t.Fatal(err)
	}
	p := vmm.Place{ID: filepath.Base(base), Dir: filepath.Join(base, "d"), Runtime: filepath.Join(base, "r")}
	for _, d := range []string{p.Dir, p.Runtime} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	p.Jail = l.jailed
	return vmm.RestoreConfig{Place: p, Machine: vmm.Machine{MemoryBytes: fakeSize, CPUs: 1, RootFS: l.rootfs}, Memory: m, State: l.state}
}

// memory serves the snapshot's memory.
func (l *fakeLab) memory(t *testing.T, policy pageserver.Policy, handler string) vmm.Memory {
	t.Helper()
	if policy == "" {
		f, err := os.Open(l.mem)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return vmm.Memory{Backend: vmm.BackendFile, File: f}
	}
	uffdtest.Require(t)
	server, err := keeper.Start(t.Context(), keeper.Config{Binary: handler, Dir: l.dir, Runtime: l.dir, MemFile: l.mem, Size: fakeSize, Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := server.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	template, err := server.Template()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { template.Close() })
	return vmm.Memory{Backend: vmm.BackendUFFD, File: template, Socket: server.Socket(), Copied: policy == pageserver.PolicyCopy}
}

func (l *fakeLab) restore(t *testing.T, m vmm.Memory) (vmm.VM, vmm.RestoreConfig) {
	t.Helper()
	c := l.config(t, m)
	c.Network = l.network
	v, err := l.engine.Restore(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = v.Kill()
		<-v.Done()
		_ = v.Release()
	})
	return v, c
}

// Each way gives clones the snapshot's memory, whole, and to each its own.
func TestFakeFirecrackerGetsItsMemory(t *testing.T) {
	handler := buildHandler(t)
	for name, policy := range map[string]pageserver.Policy{"share": pageserver.PolicyShare, "copy": pageserver.PolicyCopy, "file": ""} {
		t.Run(name, func(t *testing.T) {
			if err := attach.Probe(); policy == pageserver.PolicyShare && err != nil {
				t.Skip(err)
			}
			l := newFakeLab(t, "", firecracker.Options{})
			m := l.memory(t, policy, handler)
			one, c1 := l.restore(t, m)
			two, c2 := l.restore(t, m)
			for _, v := range []vmm.VM{one, two} {
				if r := v.Handle().Regions; len(r) != 1 || r[0].Size != fakeSize || r[0].Offset != 0 || r[0].Addr == 0 {
					t.Errorf("regions %+v", r)
				}
			}
			if _, err := askFake(c1.Runtime, "PUT", 4); err != nil {
				t.Fatal(err)
			}
			for i := range fakeSize / 4096 {
				for _, c := range []vmm.RestoreConfig{c1, c2} {
					want := content(i)
					if i == 4 && c.ID == c1.ID {
						want = 0x77
					}
					got, err := askFake(c.Runtime, "GET", i)
					if err != nil || got != fmt.Sprint(want) {
						t.Fatalf("%s: page %d holds %s, error %v, want %d", c.ID, i, got, err, want)
					}
				}
			}
		})
	}
}

// What is copied can be merged, with what others hold alike; nothing else is.
func TestMerge(t *testing.T) {
	l := newFakeLab(t, "", firecracker.Options{})
	m := l.memory(t, pageserver.PolicyCopy, buildHandler(t))
	for i, want := range []bool{false, true, true} {
		if i == 2 {
			if tapnet.Usable() != nil {
				continue
			}
			l.network = vmm.NetworkTAP
		}
		m.Merge = want
		v, c := l.restore(t, m)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/ksm_stat", v.Handle().PID))
		if err != nil || !strings.Contains(string(b), "ksm_merge_any:") {
			t.Skipf("this kernel does not tell of merging (before Linux 6.15): %v", err)
		}
		if got := strings.Contains(string(b), "ksm_merge_any: yes"); got != want {
			t.Errorf("mergeable: %t, want %t: %s", got, want, b)
		}
		if got, err := askFake(c.Runtime, "GET", 3); err != nil || got != fmt.Sprint(content(3)) {
			t.Errorf("page 3 holds %s, error %v", got, err)
		}
	}
	m = l.memory(t, "", "")
	m.Merge = true
	if _, err := l.engine.Restore(t.Context(), l.config(t, m)); err == nil || !strings.Contains(err.Error(), "only those that are copied") {
		t.Errorf("file with merging: %v", err)
	}
}

// A load that fails leaves nothing, and the error says what Firecracker said.
func TestFailedLoadIsExplained(t *testing.T) {
	handler := buildHandler(t)
	for failing, want := range map[string]string{
		"before": "No memory region defined",
		"after":  "no device",
		"death":  "the fake's last words",
	} {
		for _, policy := range []pageserver.Policy{pageserver.PolicyShare, ""} {
			t.Run(failing+"/"+string(policy), func(t *testing.T) {
				if err := attach.Probe(); policy != "" && err != nil {
					t.Skip(err)
				}
				l := newFakeLab(t, failing, firecracker.Options{})
				c := l.config(t, l.memory(t, policy, handler))
				_, err := l.engine.Restore(t.Context(), c)
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want %q", err, want)
				}
				if left, err := os.ReadDir(c.Runtime); err != nil || len(left) != 0 {
					t.Errorf("left %v, error %v", left, err)
				}
			})
		}
	}
}

func TestSharingNeedsTracing(t *testing.T) {
	l := newFakeLab(t, "", firecracker.Options{NoTrace: true})
	if _, err := l.engine.Restore(t.Context(), l.config(t, l.memory(t, pageserver.PolicyShare, buildHandler(t)))); !errors.Is(err, vmm.ErrAttach) {
		t.Errorf("error %v, want ErrAttach", err)
	}
	l.restore(t, l.memory(t, "", ""))
}

// The state is there although the request is refused, which is the point of it.
func TestSaveStateWritesNoMemory(t *testing.T) {
	l := newFakeLab(t, "", firecracker.Options{})
	v, c := l.restore(t, l.memory(t, "", ""))
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.Dir, "state")
	if err := v.SaveState(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "state" {
		t.Errorf("state %q, error %v", b, err)
	}
	if err := v.SaveState(t.Context(), path); err == nil {
		t.Error("a file that is there was written over")
	}
	for range 2 { // the second finds it running
		if err := v.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
