// Package firecracker is the engine that runs VMs with an unmodified Firecracker,
// which needs KVM.
//
// A VM is one Firecracker process in a session of its own, whose working directory
// is the VM's runtime directory. What the device state names, it names by relative
// paths there (links below): so every clone finds files of its own, or shared ones,
// under the golden VM's names, and the version need not know any override.
//
// A clone's memory comes in one of three ways. share: Firecracker maps the page
// server's template, and internal/uffd/attach puts a userfaultfd on that mapping while
// it loads. copy: Firecracker makes a userfaultfd of its own and shakes hands with
// the page server itself. file: it maps the snapshot's memory file.
//
// Files in a VM's directories are the caller's to remove once the VM has ended.
package firecracker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"

	"fcvm/internal/guest/vmlinux"
	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
	"fcvm/internal/vmm/firecracker/jail"
	"fcvm/internal/vmm/firecracker/release"
	"fcvm/internal/vmm/hugepages"
	"fcvm/internal/vmm/instance"
	"fcvm/internal/vmm/kvm"
)

// Name of the engine.
const Name = "firecracker"

// EnvBinary names the Firecracker to use when [Options] does not.
const EnvBinary = "FCVM_FIRECRACKER"

// EnvCPUTemplate names a CPU template when [Options] does not.
const EnvCPUTemplate = "FCVM_FIRECRACKER_CPU_TEMPLATE"

// startTimeout bounds a start whose context has no deadline.
const startTimeout = time.Minute

// oldest is the oldest version that boots the guests of `fcvm setup`: it tells them
// of its devices by ACPI. Before, that was done on the kernel's command line, which Debian's
// kernel does not look at.
var oldest = fcapi.Version{Major: 1, Minor: 8}

// Options of an engine. The zero value is the default.
type Options struct {
	// Binary is Firecracker's path or name; empty means $FCVM_FIRECRACKER, else the one
	// that was set up in Dir, else firecracker in PATH.
	Binary string
	// Dir is where package release installs; empty means that it was not asked to.
	Dir string
	// CPUTemplate is a file in Firecracker's own format (PUT /cpu-config) that says
	// what guests see of the processor; empty means $FCVM_FIRECRACKER_CPU_TEMPLATE, else
	// all of it.
	CPUTemplate string
	// NoTrace makes the engine do as where ptrace is not allowed.
	NoTrace bool
}

// Engine implements [vmm.Engine].
type Engine struct {
	binary, dir, cpuTemplate string

	noTrace bool
	usable  func() error // why KVM is not, if so

	jailHost *jail.Host // nil means this one

	mu     sync.Mutex // guards what follows
	probed fileID     // of the binary that version is about
	known  fcapi.Version
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
	e := &Engine{binary: o.Binary, dir: o.Dir, cpuTemplate: o.CPUTemplate, noTrace: o.NoTrace, usable: kvm.Usable}
	if e.binary == "" {
		e.binary = os.Getenv(EnvBinary)
	}
	if e.cpuTemplate == "" {
		e.cpuTemplate = os.Getenv(EnvCPUTemplate)
	}
	return e
}

// Info implements [vmm.Engine]. The version is asked of Firecracker once for each
// program.
func (e *Engine) Info(ctx context.Context) (vmm.Info, error) {
	p, err := e.Find(ctx)
	if err == nil {
		err = e.usable()
	}
	var cpu string
	if err == nil {
		cpu, err = e.cpu()
	}
	if err != nil {
		return vmm.Info{}, fmt.Errorf("%w: firecracker: %w", vmm.ErrUnavailable, err)
	}
	return vmm.Info{
		Name: Name, Version: p.Version.String(), Path: p.Path, Accel: "kvm", CPU: cpu,
		Network: tapnet.Usable() == nil, Networks: []vmm.Network{vmm.NetworkTAP, vmm.NetworkTAPHost, vmm.NetworkNone},
		HugePages: true,
	}, nil
}

// Program is a Firecracker that was found.
type Program struct {
	// Path of the program.
	Path string
	// Jailer that belongs to it; empty where there is none.
	Jailer  string
	Version fcapi.Version
}

// ErrNotFound means that there is no Firecracker.
var ErrNotFound = errors.New("there is none; `fcvm setup --engine firecracker` installs it, and " + EnvBinary + " names another")

// Find looks for Firecracker, and asks it for its version. Unlike [Engine.Info] it does
// not ask whether there is a KVM. The error wraps [ErrNotFound] where there is nothing.
func (e *Engine) Find(ctx context.Context) (Program, error) {
	p, err := e.locate()
	if err != nil {
		return p, err
	}
	p.Version, err = e.version(ctx, p.Path)
	return p, err
}

func (e *Engine) locate() (Program, error) {
	if e.binary == "" && e.dir != "" {
		i, err := release.Open(e.dir)
		if err == nil {
			return Program{Path: i.Firecracker, Jailer: i.Jailer}, nil
		}
		if !errors.Is(err, release.ErrNone) {
			return Program{}, err
		}
	}
	path, err := exec.LookPath(cmp.Or(e.binary, Name))
	if err != nil && e.binary == "" {
		return Program{}, ErrNotFound
	}
	if err != nil {
		return Program{}, err
	}
	return Program{Path: path, Jailer: release.JailerOf(path)}, nil
}

var versionLine = regexp.MustCompile(`^Firecracker v(\d+\.\d+\.\d+\S*)`)

func (e *Engine) version(ctx context.Context, path string) (fcapi.Version, error) {
	st, err := os.Stat(path)
	if err != nil {
		return fcapi.Version{}, err
	}
	id := fileID{path, st.Size(), st.ModTime()}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.probed == id {
		return e.known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fcapi.Version{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return fcapi.Version{}, fmt.Errorf("ask %s for its version: it says %.80q", path, out)
	}
	v, err := fcapi.ParseVersion(string(m[1]))
	if err != nil {
		return fcapi.Version{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	if v.Compare(oldest) < 0 {
		return fcapi.Version{}, fmt.Errorf("version %s of %s is too old: want %s or newer", v, path, oldest)
	}
	e.probed, e.known = id, v
	return v, nil
}

// cpu is what the snapshot's manifest records: a clone on another processor, or
// with another template, would be another machine.
func (e *Engine) cpu() (string, error) {
	model := "host: " + kvm.Processor()
	template, err := e.template()
	if err != nil || template == nil {
		return model, err
	}
	sum := sha256.Sum256(template)
	return model + ", template " + hex.EncodeToString(sum[:6]), nil
}

// template reads the CPU template; nil means none.
func (e *Engine) template() ([]byte, error) {
	if e.cpuTemplate == "" {
		return nil, nil
	}
	b, err := os.ReadFile(e.cpuTemplate)
	if err != nil {
		return nil, fmt.Errorf("read CPU template: %w", err)
	}
	return b, nil
}

// bound gives a start a deadline, and a word about it.
func bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("no answer within %v: %w", startTimeout, context.DeadlineExceeded))
}

// maxMemory is what fits below the second hole for devices, which newer versions have from
// 256 GiB on.
const maxMemory = 255 << 30

func (e *Engine) prepare(ctx context.Context, place vmm.Place, m vmm.Machine, ports []vmm.Port) (*launch, error) {
	info, err := e.Info(ctx)
	if err != nil {
		return nil, err
	}
	program, err := e.Find(ctx)
	if err != nil {
		return nil, err
	}
	switch {
	case m.MemoryBytes <= 0 || m.MemoryBytes%(2<<20) != 0:
		return nil, fmt.Errorf("guest memory of %d bytes: want a multiple of 2 MiB", m.MemoryBytes)
	case m.MemoryBytes > maxMemory:
		return nil, fmt.Errorf("guest memory of %d bytes: the Firecracker engine gives at most 255 GiB; use the engine qemu", m.MemoryBytes)
	case m.CPUs < 1 || m.CPUs > 32:
		return nil, fmt.Errorf("%d CPUs: want 1 to 32", m.CPUs)
	case m.Network == vmm.NetworkUser:
		return nil, errors.New("network user: the engine firecracker has tap, tap-host and none")
	case len(ports) > 0 && !m.Network.TAP():
		return nil, vmm.ErrNoNetwork
	}
	if m.RootFS == "" {
		return nil, errors.New("no root file system")
	}
	if _, err := os.Stat(m.RootFS); err != nil {
		return nil, fmt.Errorf("open the image's root file system: %w: pull the image again", err)
	}
	return &launch{binary: info.Path, jailer: program.Jailer, jailHost: e.jailHost, place: place, machine: m, ports: ports}, nil
}

// needHugePages refuses to start what would be killed for want of a huge page: Firecracker
// takes them when the guest touches them, and has a SIGBUS where none is left.
func needHugePages(m vmm.Machine, pages int64) error {
	if !m.HugePages {
		return nil
	}
	pool, err := hugepages.Read("/")
	if err == nil {
		err = pool.Need(int(pages))
	}
	if err != nil {
		return fmt.Errorf("memory of huge pages: %w", err)
	}
	return nil
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
	if err := needHugePages(c.Machine, c.MemoryBytes/hugepages.Size); err != nil {
		return nil, fmt.Errorf("boot: %w", err)
	}
	if _, err := os.Stat(c.Initrd); err != nil {
		return nil, fmt.Errorf("boot: %w: run `fcvm setup`", err)
	}
	kernel, err := vmlinux.Beside(c.Kernel)
	if err != nil {
		return nil, fmt.Errorf("boot: %w", err)
	}
	template, err := e.template()
	if err != nil {
		return nil, fmt.Errorf("boot: %w", err)
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	initrd := c.Initrd
	if l.jail != nil {
		if err := errors.Join(l.jail.LinkOrCopy(kernel, jailedKernel), l.jail.LinkOrCopy(initrd, jailedInitrd)); err != nil {
			return nil, fmt.Errorf("boot: %w", err)
		}
		kernel, initrd = jailedKernel, jailedInitrd
	}
	if err := l.run(ctx); err != nil {
		return nil, err
	}
	if err := l.connect(ctx); err != nil {
		return nil, err
	}
	args := cmdline(c.Cmdline)
	if err := l.boot(ctx, kernel, initrd, args, template); err != nil {
		return nil, l.explain(ctx, "boot", err)
	}
	regions, err := anonymousMemory(l.proc.PID(), pieces(c.MemoryBytes, l.client.Version()), args)
	if err != nil {
		return nil, l.explain(ctx, "boot", err)
	}
	if err := l.publish(ctx); err != nil {
		return nil, err
	}
	return l.done(regions), nil
}

// console is a word of the command line of every guest that this engine boots.
const console = "console=ttyS0"

// cmdline is the kernel's: what the guest does, then what this machine needs. Of
// two values the kernel takes the last.
func cmdline(more string) string {
	c := []string{
		more,
		console,
		// Firecracker ends cleanly at a reset by the keyboard controller; a triple
		// fault is an error to it.
		"reboot=k",
		// Nothing is there to be probed for.
		"pci=off", "8250.nr_uarts=1", "i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd",
		fmt.Sprintf("fcvm.vsock=%d", agentPort),
		"fcvm.log=" + logDevice,
	}
	return strings.TrimSpace(strings.Join(c, " "))
}

// Adopt implements [vmm.Engine].
func (e *Engine) Adopt(_ context.Context, h vmm.Handle) (vmm.VM, error) {
	v, err := instance.Adopt(Name, h)
	if err != nil {
		return nil, err
	}
	return &vm{VM: v}, nil
}
