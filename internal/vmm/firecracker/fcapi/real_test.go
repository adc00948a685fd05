package fcapi_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fcvm/internal/vmm/firecracker/fcapi"
)

// startReal starts the real program, which needs no KVM before it starts a VM.
func startReal(t *testing.T) (c *fcapi.Client, ended <-chan struct{}) {
	t.Helper()
	name := os.Getenv("FCVM_FIRECRACKER")
	if name == "" {
		name = "firecracker"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no Firecracker: %v; name one with FCVM_FIRECRACKER", err)
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "api.sock")
	cmd := exec.Command(path, "--api-sock", socket)
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("Firecracker said: %s", &out)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), fcapi.Timeout)
	defer cancel()
	for {
		c, err := fcapi.Dial(ctx, socket)
		if err == nil {
			t.Cleanup(c.Close)
			return c, done
		}
		select {
		case <-done:
			t.Fatalf("it ended: %v", err)
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// The real program accepts every field that fcvm sends its version: where it has
// something to say, it is about what the field says.
func TestRealFirecrackerKnowsTheFields(t *testing.T) {
	c, _ := startReal(t)
	t.Logf("Firecracker %s", c.Version())
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ctx := t.Context()
	for name, do := range map[string]func() error{
		"logger":  func() error { return c.SetLogger(ctx, fcapi.Logger{Path: file("log"), Level: "Info", ShowLevel: true}) },
		"metrics": func() error { return c.SetMetrics(ctx, file("metrics")) },
		"machine": func() error {
			return c.SetMachineConfig(ctx, fcapi.MachineConfig{VCPUs: 1, MemoryMiB: 128, TrackDirtyPages: true})
		},
		"boot": func() error {
			return c.SetBootSource(ctx, fcapi.BootSource{Kernel: file("vmlinux"), Initrd: file("initramfs"), Args: "console=ttyS0"})
		},
		"drive": func() error {
			return c.AddDrive(ctx, fcapi.Drive{ID: "root", Path: file("rootfs"), Root: true, ReadOnly: true})
		},
		"vsock":   func() error { return c.SetVsock(ctx, fcapi.Vsock{CID: 3, Socket: filepath.Join(dir, "v.sock")}) },
		"entropy": func() error { return c.AddEntropy(ctx) },
		"balloon": func() error {
			return c.SetBalloon(ctx, fcapi.Balloon{DeflateOnOOM: true, StatsInterval: 1, Reporting: c.Has(fcapi.FreePageReporting), Hinting: c.Has(fcapi.FreePageHinting)})
		},
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// These need a VM that runs, or a device that this host may not have: they are
	// refused, but not for how they are written.
	nic := fcapi.NetworkInterface{ID: "eth0", HostDevice: "not a device at all", MAC: "06:00:00:00:00:01"}
	if c.Has(fcapi.MTU) {
		nic.MTU = 1400
	}
	for name, do := range map[string]func() error{
		"network":        func() error { return c.AddNetworkInterface(ctx, nic) },
		"inflate":        func() error { return c.Inflate(ctx, 1) },
		"stats interval": func() error { return c.SetStatsInterval(ctx, 1) },
		"pause":          func() error { return c.SetState(ctx, fcapi.Paused) },
		"create": func() error {
			return c.CreateSnapshot(ctx, fcapi.SnapshotCreate{Type: fcapi.Diff, StateFile: filepath.Join(dir, "s"), MemoryFile: filepath.Join(dir, "m")})
		},
	} {
		wantRefused(t, name, do())
	}
	if c.Has(fcapi.FreePageHinting) {
		wantRefused(t, "start hinting", c.StartHinting(ctx))
		wantRefused(t, "stop hinting", c.StopHinting(ctx))
	}
	if i, err := c.Instance(ctx); err != nil || i.State != "Not started" {
		t.Errorf("instance %+v, error %v", i, err)
	}
}

// A load that fails says why, and ends Firecracker.
func TestRealFirecrackerRefusesALoad(t *testing.T) {
	c, ended := startReal(t)
	load := fcapi.SnapshotLoad{
		StateFile:       filepath.Join(t.TempDir(), "none"),
		Memory:          fcapi.MemoryBackend{Type: fcapi.UFFD, Path: "/none"},
		TrackDirtyPages: true,
		Resume:          true,
		ClockRealtime:   c.Has(fcapi.ClockRealtime),
	}
	if c.Has(fcapi.NetworkOverrides) {
		load.Network = []fcapi.NetworkOverride{{ID: "eth0", HostDevice: "tap1"}}
	}
	if c.Has(fcapi.VsockOverride) {
		load.VsockSocket = "v.sock"
	}
	err := c.LoadSnapshot(t.Context(), load)
	wantRefused(t, "load", err)
	if err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("error %v", err)
	}
	<-ended
	if err := c.LoadSnapshot(t.Context(), load); !errors.Is(err, fcapi.ErrClosed) {
		t.Errorf("error %v after its end", err)
	}
}

func wantRefused(t *testing.T, name string, err error) {
	t.Helper()
	var refused *fcapi.Error
	if !errors.As(err, &refused) || strings.Contains(refused.Fault, "unknown field") || strings.Contains(refused.Fault, "deserializing") ||
		strings.Contains(refused.Fault, "Invalid request method") {
		t.Errorf("%s: error %v", name, err)
		return
	}
	t.Logf("%s: %v", name, err)
}
