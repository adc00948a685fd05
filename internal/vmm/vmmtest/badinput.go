package vmmtest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fcvm/internal/vmm"
)

func (l *lab) testBadBoot(t *testing.T) {
	for name, spoil := range map[string]func(*vmm.BootConfig){
		"no kernel":       func(c *vmm.BootConfig) { c.Kernel = "/nonexistent/vmlinuz" },
		"no initramfs":    func(c *vmm.BootConfig) { c.Initrd = "/nonexistent/initrd" },
		"no root":         func(c *vmm.BootConfig) { c.RootFS = "/nonexistent/rootfs" },
		"no memory":       func(c *vmm.BootConfig) { c.MemoryBytes = 0 },
		"odd memory":      func(c *vmm.BootConfig) { c.MemoryBytes++ },
		"no CPU":          func(c *vmm.BootConfig) { c.CPUs = 0 },
		"odd protocol":    func(c *vmm.BootConfig) { c.Ports[0].Proto = "sctp" },
		"odd address":     func(c *vmm.BootConfig) { c.Ports[0].HostIP = "localhost" },
		"port 0":          func(c *vmm.BootConfig) { c.Ports[0].HostPort = 0 },
		"guest port 7e4":  func(c *vmm.BootConfig) { c.Ports[0].GuestPort = 70000 },
		"no such runtime": func(c *vmm.BootConfig) { c.Runtime = filepath.Join(c.Runtime, "missing") },
		"no such dir":     func(c *vmm.BootConfig) { c.Dir = filepath.Join(c.Dir, "missing") },
	} {
		t.Run(name, func(t *testing.T) {
			p := l.place(t, "bad")
			c := l.bootConfig(p, l.portsToSpoil(t))
			spoil(&c)
			v, err := l.engine.Boot(within(t), c)
			if err == nil {
				l.owned(t, v, p, 0)
				t.Fatal("no error")
			}
			t.Log(err)
			nothingLeft(t, p)
		})
	}
}

func (l *lab) testBadRestore(t *testing.T) {
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("no device state ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(l.snapshot.state)
	if err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(t.TempDir(), "half")
	if err := os.WriteFile(half, state[:len(state)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	short, err := os.Create(filepath.Join(t.TempDir(), "short"))
	if err != nil {
		t.Fatal(err)
	}
	defer short.Close()
	if err := short.Truncate(memoryBytes - 4096); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*vmm.RestoreConfig){
		"no state":       func(c *vmm.RestoreConfig) { c.State = "/nonexistent/state" },
		"garbage":        func(c *vmm.RestoreConfig) { c.State = garbage },
		"half a state":   func(c *vmm.RestoreConfig) { c.State = half },
		"short memory":   func(c *vmm.RestoreConfig) { c.Memory.File = short },
		"no memory":      func(c *vmm.RestoreConfig) { c.Memory.File = nil },
		"odd backend":    func(c *vmm.RestoreConfig) { c.Memory.Backend = "magic" },
		"no page server": func(c *vmm.RestoreConfig) { c.Memory.Backend, c.Memory.Socket = vmm.BackendUFFD, "/nonexistent/sock" },
		"no root":        func(c *vmm.RestoreConfig) { c.RootFS = "/nonexistent/rootfs" },
		"odd port":       func(c *vmm.RestoreConfig) { c.Ports[0].GuestPort = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			p := l.place(t, "bad")
			c := l.restoreConfig(p, l.memory(t, backends[0], l.snapshot), l.snapshot, l.portsToSpoil(t))
			spoil(&c)
			v, err := l.engine.Restore(within(t), c)
			if err == nil {
				l.owned(t, v, p, 0)
				t.Fatal("no error")
			}
			t.Log(err)
			nothingLeft(t, p)
		})
	}
}

// portsToSpoil are there also for an engine that publishes none; any will then do.
func (l *lab) portsToSpoil(t *testing.T) []vmm.Port {
	t.Helper()
	if l.noNetwork {
		return published(1)
	}
	return published(l.freePort(t))
}

// Whenever a boot is given up, nothing of it is left.
func (l *lab) testCancelBoot(t *testing.T) {
	for i := range 8 {
		p := l.place(t, "cancel")
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*8*time.Millisecond)
		v, err := l.engine.Boot(ctx, l.bootConfig(p, nil))
		cancel()
		if err == nil {
			s := l.owned(t, v, p, 0)
			if err := s.Pause(within(t)); err != nil {
				t.Errorf("the VM ended with the context of its start: %v", err)
			}
			continue
		}
		nothingLeft(t, p)
	}
}

// A guest that dies while it boots ends the VM, and its console tells why.
func (l *lab) testNeverBoots(t *testing.T) {
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(initrd, []byte("no initramfs"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := l.place(t, "panic")
	c := l.bootConfig(p, nil)
	c.Initrd = initrd
	v, err := l.engine.Boot(within(t), c)
	if err != nil {
		t.Fatal(err)
	}
	s := l.owned(t, v, p, 0)
	select {
	case <-s.Done():
	case <-within(t).Done():
		t.Fatalf("a guest without an init goes on: %s", s.Tail())
	}
	if tail := s.Tail(); !strings.Contains(tail, "panic") {
		t.Errorf("the end of the console does not tell of the panic:\n%s", tail)
	}
	if n := strings.Count(s.Tail(), "\n"); n > 25 {
		t.Errorf("the tail has %d lines", n)
	}
}
