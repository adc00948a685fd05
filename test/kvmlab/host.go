//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest"
	"fcvm/internal/guest/vmlinux"
	"fcvm/internal/vmm/qemu"
)

// cpu is a processor with AMD's virtualization, which TCG translates, nested page
// tables included. Without XSAVE and what it saves, because the translator does not hand
// XSETBV of a nested guest to KVM, which then switches to a value that the guest never
// chose: Linux warns of "XSAVE consistency" and would save too little. Family 26, because
// guests protect themselves against the faults of the older ones at each system call.
const cpu = "EPYC,family=26,-avx,-avx2,-f16c,-fma"

// withoutXSAVE is appended to cpu, unless -xsave is given: Firecracker insists on XSAVE.
// Its guests must then be kept from it by a CPU template.
const withoutXSAVE = ",-xsave,-xsaveopt,-xgetbv1"

// kernelPackage is Debian's kernel for all machines: the one for VMs has no 9p.
const kernelPackage = "linux-image-amd64"

func (o options) run(ctx context.Context) (int, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return 0, err
	}
	cache = filepath.Join(cache, "fcvm-test")
	exe, err := os.Executable()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "kvmlab")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	setup := guest.SetupOptions{Dir: filepath.Join(cache, "kvmlab"), InitBinary: exe, Package: kernelPackage, Extra: labModules}
	if o.kernelDeb != "" {
		setup.Dir, setup.KernelDeb = filepath.Join(dir, "kernel"), o.kernelDeb
	}
	assets, err := guest.Setup(ctx, setup)
	if err != nil {
		return 0, err
	}
	m := &machine{options: o, assets: assets, console: filepath.Join(dir, "console"), log: filepath.Join(dir, "qemu")}
	if m.layout.Guest, err = guestFor(ctx, cache, dir); err != nil {
		return 0, err
	}
	if err := m.start(ctx); err != nil {
		return 0, err
	}
	defer m.stop()
	code, err := m.command(ctx)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w\n%s", err, m.tail())
	}
	return code, err
}

// guestFor returns a directory with a guest for the fcvm that is tested, or nothing
// when none is named: there is no network in the lab to download a kernel from.
func guestFor(ctx context.Context, cache, dir string) (string, error) {
	bin := os.Getenv("FCVM_TEST_BIN")
	if bin == "" {
		return "", nil
	}
	a, err := guest.Setup(ctx, guest.SetupOptions{Dir: filepath.Join(cache, "guest"), InitBinary: filepath.Join(bin, "fcvm-init")})
	if err != nil {
		return "", err
	}
	// A later setup removes what this one made.
	own := filepath.Join(dir, "guest")
	return own, a.CopyTo(own)
}

// machine is the lab's QEMU.
type machine struct {
	options
	assets       *guest.Assets
	layout       layout
	console, log string

	conn  net.Conn // to the agent's port
	kill  func() error
	ended chan struct{}
}

func (m *machine) start(ctx context.Context) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "agent of QEMU")
	defer theirs.Close()
	m.conn, err = net.FileConn(ours)
	ours.Close()
	if err != nil {
		return err
	}
	args, err := m.args()
	if err != nil {
		return err
	}
	log, err := os.Create(m.log)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.ExtraFiles = []*os.File{theirs} // 3
	cmd.Stdout, cmd.Stderr = log, log
	if m.options.console {
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	}
	// A group of its own, so that Ctrl-C is ours to handle; and the lab ends with us,
	// however we end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	m.ended = make(chan struct{})
	go func() {
		// Pdeathsig is about the thread that started it.
		runtime.LockOSThread()
		defer close(m.ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ends shows in the log
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start qemu: %w: run `make deps`", err)
	}
	m.kill = cmd.Process.Kill
	return nil
}

// stop ends the lab at once: nothing in it is worth a goodbye.
func (m *machine) stop() {
	_ = m.kill() // it may have ended
	<-m.ended
	m.conn.Close()
}

func (m *machine) args() ([]string, error) {
	line, err := m.cmdline()
	if err != nil {
		return nil, err
	}
	// Unpacked here, once, and not translated at each boot.
	kernel, err := vmlinux.Beside(m.assets.Kernel)
	if err != nil {
		return nil, err
	}
	console := "file:" + m.console
	if m.options.console {
		console = "stdio"
	}
	model := cpu
	if !m.options.xsave {
		model += withoutXSAVE
	}
	a := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", "guest=kvmlab",
		"-M", "microvm,x-option-roms=off", "-accel", "tcg,thread=multi,tb-size=512",
		"-cpu", model, "-smp", strconv.Itoa(m.cpus), "-m", strconv.Itoa(m.memory) + "M",
		"-kernel", kernel, "-initrd", m.assets.Initrd, "-append", line,
		"-global", "virtio-mmio.force-legacy=false",
		"-serial", console,
		"-chardev", "socket,id=agent,fd=3", "-chardev", "null,id=log",
		"-device", "virtio-serial-device",
		"-device", "virtserialport,chardev=agent,name=fcvm.agent",
		"-device", "virtserialport,chardev=log,name=fcvm.log",
		"-device", "virtio-rng-device",
		"-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
		"-device", "virtio-9p-device,fsdev=root,mount_tag=" + rootTag,
	}
	for tag, dir := range m.layout.Writable {
		a = append(a, "-fsdev", "local,id="+tag+",security_model=none,multidevs=remap,path="+strings.ReplaceAll(dir, ",", ",,"),
			"-device", "virtio-9p-device,fsdev="+tag+",mount_tag="+tag)
	}
	return a, nil
}

func (m *machine) cmdline() (string, error) {
	m.layout.Writable = map[string]string{}
	for i, dir := range m.writable {
		m.layout.Writable["w"+strconv.Itoa(i)] = dir
	}
	l, err := m.layout.param()
	if err != nil {
		return "", err
	}
	c := []string{
		"console=ttyS0", "reboot=t", "panic=-1", "loglevel=4", "quiet", "random.trust_cpu=on", "nowatchdog", "audit=0",
		"mitigations=off", "nosmap", "nosmep", "no5lvl", "tsc=reliable",
	}
	if khz := qemu.TSCKHz(); khz != 0 {
		c = append(c, fmt.Sprintf("tsc_early_khz=%d", khz))
	}
	return strings.Join(append(c, l), " "), nil
}

// tail is the end of what QEMU and the lab's kernel said.
func (m *machine) tail() string {
	var all []string
	for _, path := range []string{m.log, m.console} {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")
		all = append(all, lines[max(0, len(lines)-15):]...)
	}
	return strings.Join(all, "\n")
}
