// Package qemu is the engine that runs VMs with an unmodified QEMU, on its
// "microvm" machine, under KVM or TCG.
//
// A VM is one QEMU process in a session of its own. It is controlled over QMP,
// on a listening socket that was made before QEMU was started, so that nothing
// is ever polled. A clone's memory is put in place by internal/uffd/attach
// while QEMU starts; its device state is loaded from an inherited file.
//
// Files in a VM's directories are the caller's to remove once the VM has ended.
package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/instance"
)

// Name of the engine.
const Name = "qemu"

// EnvBinary names the QEMU to use when [Options] does not.
const EnvBinary = "FCVM_QEMU"

// EnvAccel is "kvm" or "tcg" to force an accelerator when [Options] does not.
const EnvAccel = "FCVM_QEMU_ACCEL"

// EnvCPU names a CPU model when [Options] does not.
const EnvCPU = "FCVM_QEMU_CPU"

// defaultBinary is looked for in PATH.
const defaultBinary = "qemu-system-x86_64"

// startTimeout bounds a start whose context has no deadline. Bare QEMU takes
// 50 ms; a hundred started at once on two cores take seconds.
const startTimeout = time.Minute

// Options of an engine. The zero value is the default.
type Options struct {
	// Binary is QEMU's path or name; empty means $FCVM_QEMU, else
	// qemu-system-x86_64 in PATH.
	Binary string
	// ForceAccel is "kvm" or "tcg"; empty means $FCVM_QEMU_ACCEL, else KVM where
	// it is really usable, else TCG.
	ForceAccel string
	// CPU is the CPU model that guests get, with its features, as QEMU's -cpu takes
	// it; empty means $FCVM_QEMU_CPU, else "host" with KVM and "max" with TCG. A clone
	// needs the one that its snapshot was made with.
	CPU string
	// NoTrace makes the engine do as where ptrace is not allowed.
	NoTrace bool
}

// Engine implements [vmm.Engine].
type Engine struct {
	binary, forceAccel, cpu string
	noTrace                 bool
	tsc                     func() uint64 // measures once

	mu     sync.Mutex // guards what follows
	probed fileID     // of the binary that info is about
	info   vmm.Info
}

// fileID tells whether a program was replaced, by an upgrade say.
type fileID struct {
	path  string
	size  int64
	mtime time.Time
}

var _ vmm.Engine = (*Engine)(nil)

// New makes an engine. It looks for nothing yet: see [Engine.Info].
func New(o Options) *Engine {
	e := &Engine{binary: o.Binary, forceAccel: o.ForceAccel, noTrace: o.NoTrace, tsc: sync.OnceValue(TSCKHz)}
	if e.binary == "" {
		e.binary = os.Getenv(EnvBinary)
	}
	if e.binary == "" {
		e.binary = defaultBinary
	}
	if e.forceAccel == "" {
		e.forceAccel = os.Getenv(EnvAccel)
	}
	if e.cpu = o.CPU; e.cpu == "" {
		e.cpu = os.Getenv(EnvCPU)
	}
	return e
}

// Info implements [vmm.Engine]. The version is asked of QEMU once for each
// program: that takes 20 ms.
func (e *Engine) Info(ctx context.Context) (vmm.Info, error) {
	path, err := exec.LookPath(e.binary)
	if err != nil {
		return vmm.Info{}, fmt.Errorf("%w: qemu: %w: install it (Debian: apt install qemu-system-x86), or name it with %s", vmm.ErrUnavailable, err, EnvBinary)
	}
	st, err := os.Stat(path)
	if err != nil {
		return vmm.Info{}, fmt.Errorf("%w: qemu: %w", vmm.ErrUnavailable, err)
	}
	id := fileID{path, st.Size(), st.ModTime()}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.probed == id {
		return e.info, nil
	}
	a, err := chooseAccel(e.forceAccel)
	if err != nil {
		return vmm.Info{}, fmt.Errorf("%w: qemu: %w", vmm.ErrUnavailable, err)
	}
	version, err := askVersion(ctx, path)
	if err != nil {
		return vmm.Info{}, fmt.Errorf("%w: qemu: %w", vmm.ErrUnavailable, err)
	}
	_, cpu := cpuModel(a, e.cpu)
	e.probed, e.info = id, vmm.Info{Name: Name, Version: version, Path: path, Accel: string(a), CPU: cpu, Network: true,
		Networks: []vmm.Network{vmm.NetworkUser, vmm.NetworkTAP, vmm.NetworkTAPHost, vmm.NetworkNone}}
	return e.info, nil
}

var versionLine = regexp.MustCompile(`^QEMU emulator version (\d+(?:\.\d+)+)`)

func askVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", path, err)
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: it says %.80q", path, out)
	}
	return string(m[1]), nil
}

// prepare fills in what all starts have in common.
func (e *Engine) prepare(ctx context.Context, place vmm.Place, m vmm.Machine, ports []vmm.Port) (*launch, error) {
	info, err := e.Info(ctx)
	if err != nil {
		return nil, err
	}
	if place.Jail {
		return nil, vmm.ErrNoJail
	}
	if m.HugePages {
		return nil, vmm.ErrNoHugePages
	}
	if _, err := os.Stat(m.RootFS); m.RootFS != "" && err != nil {
		return nil, fmt.Errorf("open the image's root file system: %w: pull the image again", err)
	}
	a := accel(info.Accel)
	cpu, _ := cpuModel(a, e.cpu)
	return &launch{binary: info.Path, m: machine{Place: place, Machine: m, ports: ports, accel: a, cpu: cpu}}, nil
}

// bound gives a start a deadline, and a word about it.
func bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("no answer within %v: %w", startTimeout, context.DeadlineExceeded))
}

// Boot implements [vmm.Engine].
func (e *Engine) Boot(ctx context.Context, c vmm.BootConfig) (_ vmm.VM, err error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	l, err := e.prepare(ctx, c.Place, c.Machine, c.Ports)
	if err != nil {
		return nil, err
	}
	defer func() { l.close(err != nil) }()
	for _, f := range []string{c.Kernel, c.Initrd} {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("boot: %w: run `fcvm setup`", err)
		}
	}
	l.m.kernel, l.m.initrd, l.m.cmdline = c.Kernel, c.Initrd, e.cmdline(l.m.accel, c.Cmdline)
	if err := l.open(ctx); err != nil {
		return nil, err
	}
	if err := l.run(ctx, startPlain); err != nil {
		return nil, err
	}
	if _, err := l.connect(ctx); err != nil {
		return nil, err
	}
	regions, err := guestRegions(ctx, l.client, l.proc.PID(), c.MemoryBytes)
	if err != nil {
		return nil, l.explain(ctx, err)
	}
	if err := l.publish(ctx); err != nil {
		return nil, err
	}
	return l.done(regions), nil
}

// cmdline is the kernel's: what this machine needs, then what the guest does.
func (e *Engine) cmdline(a accel, more string) string {
	c := []string{"console=ttyS0"}
	if a == tcg {
		if khz := e.tsc(); khz != 0 {
			c = append(c, fmt.Sprintf("tsc_early_khz=%d", khz))
		}
		// Every kernel function costs its translation in every clone. What guards the
		// guest's kernel against its own processes' speculation has no meaning for
		// translated code, and what the translator does in software is slow.
		c = append(c, "mitigations=off", "nosmap", "nosmep", "no5lvl")
	}
	if more != "" {
		c = append(c, more)
	}
	return strings.Join(c, " ")
}

// Adopt implements [vmm.Engine].
func (e *Engine) Adopt(_ context.Context, h vmm.Handle) (vmm.VM, error) {
	v, err := instance.Adopt(Name, h)
	if err != nil {
		return nil, err
	}
	return &vm{VM: v}, nil
}
