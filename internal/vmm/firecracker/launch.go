package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/proto"
	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
	"fcvm/internal/vmm/firecracker/jail"
	"fcvm/internal/vmm/instance"
	"fcvm/internal/vmm/merge"
	"fcvm/internal/vmm/process"
	"fcvm/internal/vmm/vmlog"
)

// Files in [vmm.Place]. The device state names those of Runtime, so they are the
// same for every VM that ever was.
const (
	consoleLog   = "console.log"   // Dir
	containerLog = "container.log" // Dir
	vmmLog       = "vmm.log"       // Dir

	apiSocket   = "api.sock"      // Runtime
	vsockSocket = "v.sock"        // Runtime
	rootLink    = "rootfs"        // Runtime, to the image
	logLink     = "container.log" // Runtime, to Dir's
)

// Files in the root of a jail, besides those that the device state names.
const (
	jailedLog    = "vmm.log"
	jailedKernel = "vmlinux"
	jailedInitrd = "initrd"
	jailedState  = "load.state"
	jailedMemory = "memory"
	jailedServer = "uffd.sock"
)

const (
	// agentPort is the guest's vsock port for its agent; guestCID its address, which
	// may be every VM's, because each has a socket of its own.
	agentPort = 52
	guestCID  = 3
	// guestMAC may be every VM's as well: it is alone on its TAP. The address is a
	// locally administered one.
	guestMAC = "02:fc:00:00:00:0f"
	// logDevice is the second drive.
	logDevice = "/dev/vdb"
)

// launch is a Firecracker that is being started. Its steps are: open, then add,
// then run, then requests; close undoes all of it, done lets the VM live.
type launch struct {
	binary, jailer string
	jailHost       *jail.Host
	place          vmm.Place
	machine        vmm.Machine
	jail           *jail.Jail // nil without one
	ports          []vmm.Port

	// merge has the kernel merge its memory with that of others.
	merge bool

	files  []*os.File // fd 3 and up in the child
	owned  []*os.File // ours to close when the child has its copies
	proc   *process.Process
	net    *tapnet.Network // nil without a TAP
	traced bool            // by attach, which starts Firecracker then
	client *fcapi.Client
	said   int64 // size of Firecracker's log before it was started
}

// firstFD is where files begin in a child; os/exec.
const firstFD = 3

// open lays out what the VM's devices name.
func (l *launch) open() error {
	log := filepath.Join(l.place.Dir, containerLog)
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("make log: %w", err)
	}
	// A hole, whatever its size.
	if err := errors.Join(f.Truncate(proto.LogDeviceBytes), f.Close()); err != nil {
		return fmt.Errorf("make log: %w", err)
	}
	if l.place.Jail {
		err = l.lockUp(log)
	} else {
		err = l.link(log)
	}
	if err != nil {
		return err
	}
	for _, f := range l.place.Inherit {
		l.add(f)
	}
	return nil
}

// link puts what the VM's devices name into its working directory.
func (l *launch) link(log string) error {
	// An earlier start in the same place may have left them.
	for _, name := range []string{apiSocket, vsockSocket, rootLink, logLink} {
		if err := os.Remove(filepath.Join(l.place.Runtime, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove what an earlier VM left: %w", err)
		}
	}
	for name, target := range map[string]string{rootLink: l.machine.RootFS, logLink: log} {
		if err := os.Symlink(target, filepath.Join(l.place.Runtime, name)); err != nil {
			return fmt.Errorf("link what the VM uses: %w", err)
		}
	}
	return nil
}

// lockUp makes a jail, and puts into its root what the VM's devices name.
func (l *launch) lockUp(log string) error {
	j, err := jail.New(jail.Config{
		Dir: l.place.Dir, ID: l.place.ID, Firecracker: l.binary, Jailer: l.jailer,
		Limits: jail.Limits{MemoryBytes: l.machine.MemoryBytes, CPUs: l.machine.CPUs},
		Host:   l.jailHost,
	})
	if err != nil {
		return err
	}
	l.jail = j
	l.add(j.Claim())
	root, err := os.Open(l.machine.RootFS)
	if err != nil {
		return fmt.Errorf("open the image's root file system: %w", err)
	}
	defer root.Close()
	return errors.Join(j.Link(root, rootLink), j.Give(log, logLink), j.Give(filepath.Join(l.place.Dir, vmmLog), jailedLog))
}

// add gives the child a file, and returns its number there.
func (l *launch) add(f *os.File) int {
	l.files = append(l.files, f)
	return firstFD + len(l.files) - 1
}

// inherited is the path by which the child opens a file that it was given.
func inherited(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// instanceID is what Firecracker accepts as --id.
var instanceID = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

// command is Firecracker's, not started. It runs in a session of its own, because
// it outlives this process and must not get the terminal's signals.
func (l *launch) command(ctx context.Context) (*exec.Cmd, error) {
	path := filepath.Join(l.place.Dir, vmmLog)
	out, err := l.appendTo(path)
	if err != nil {
		return nil, err
	}
	if info, err := out.Stat(); err == nil {
		l.said = info.Size()
	}
	// The guest's serial console is Firecracker's standard output.
	console, err := l.appendTo(filepath.Join(l.place.Dir, consoleLog))
	if err != nil {
		return nil, err
	}
	if l.jail != nil {
		path = jailedLog
	}
	args := []string{"--api-sock", apiSocket, "--log-path", path, "--level", "Error", "--show-level"}
	var cmd *exec.Cmd
	if l.jail != nil {
		cmd = l.jail.Command(args...)
	} else {
		if instanceID.MatchString(l.place.ID) {
			args = append(args, "--id", l.place.ID)
		}
		cmd = exec.Command(l.binary, args...)
		cmd.Dir = l.place.Runtime
		cmd.Env = []string{"LC_ALL=C"} // it looks at none
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	}
	cmd.Stdout, cmd.Stderr = console, out
	cmd.ExtraFiles = l.files
	if l.machine.Network.TAP() {
		if l.net, err = tapnet.Start(ctx, l.place.Runtime, l.machine.Network, out); err != nil {
			return nil, err
		}
		l.owned = append(l.owned, l.net.Wrap(cmd, l.traced))
	}
	if l.merge {
		merge.Command(cmd) // whatever is executed then inherits it
	}
	return cmd, nil
}

func (l *launch) appendTo(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	l.owned = append(l.owned, f)
	return f, nil
}

// run starts Firecracker, and takes over its process.
func (l *launch) run(ctx context.Context) error {
	cmd, err := l.command(ctx)
	if err != nil {
		return err
	}
	start := (*exec.Cmd).Start
	if l.jail != nil {
		// The jailer would close what Firecracker is to inherit.
		start = func(cmd *exec.Cmd) error { return process.StartWithout(cmd, unix.SYS_CLOSE_RANGE) }
	}
	if err := start(cmd); err != nil {
		return fmt.Errorf("start firecracker: %w", err)
	}
	l.proc, err = process.Started(cmd)
	if errors.Is(err, process.ErrGone) {
		// What it said, in its log, is the reason.
		return l.explain(ctx, "start firecracker", fmt.Errorf("%w: %w", fcapi.ErrClosed, err))
	}
	if err != nil {
		return fmt.Errorf("start firecracker: %w", err)
	}
	l.closeOwned()
	return nil
}

// socketEvery is how often a Firecracker that is being started is asked whether it
// listens: it takes some 10 ms, and gives no sign.
const socketEvery = time.Millisecond

// dial waits until Firecracker listens. ended, which may be closed, tells that it
// never will.
func (l *launch) dial(ctx context.Context, ended <-chan struct{}) (*fcapi.Client, error) {
	h := l.handle()
	tick := time.NewTicker(socketEvery)
	defer tick.Stop()
	for {
		c, err := fcapi.New(ctx, func(ctx context.Context) (net.Conn, error) { return dialVMM(ctx, h, apiSocket) })
		if err == nil || !errors.Is(err, fcapi.ErrClosed) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-ended:
			return nil, err
		case <-tick.C:
		}
	}
}

// dialVMM connects to one of a VM's sockets.
func dialVMM(ctx context.Context, h vmm.Handle, socket string) (net.Conn, error) {
	if h.Root != "" {
		return jail.Dial(ctx, h.Root, socket)
	}
	// The path is short: the runtime directory is made for sockets.
	var d net.Dialer
	return d.DialContext(ctx, "unix", filepath.Join(h.Runtime, socket))
}

func (l *launch) connect(ctx context.Context) error {
	c, err := l.dial(ctx, l.proc.Done())
	if err != nil {
		return l.explain(ctx, "start firecracker", err)
	}
	l.client = c
	return nil
}

// boot configures the machine and starts it. The devices, and their order, are the
// same for every VM.
func (l *launch) boot(ctx context.Context, kernel, initrd, args string, template []byte) error {
	c := l.client
	if template != nil {
		if err := c.SetCPUConfig(ctx, template); err != nil {
			return err
		}
	}
	// Not to be deflated by the guest: what was given is given, and Linux then counts it
	// out of the guest's memory, as on QEMU.
	balloon := fcapi.Balloon{Reporting: c.Has(fcapi.FreePageReporting)}
	for _, step := range []func() error{
		func() error {
			m := fcapi.MachineConfig{VCPUs: l.machine.CPUs, MemoryMiB: l.machine.MemoryBytes >> 20}
			if l.machine.HugePages {
				m.HugePages = "2M"
			}
			return c.SetMachineConfig(ctx, m)
		},
		func() error {
			return c.SetBootSource(ctx, fcapi.BootSource{Kernel: kernel, Initrd: initrd, Args: args})
		},
		// Not as the root, for which Firecracker would put words on the command line.
		func() error { return c.AddDrive(ctx, fcapi.Drive{ID: "root", Path: rootLink, ReadOnly: true}) },
		func() error { return c.AddDrive(ctx, fcapi.Drive{ID: "log", Path: logLink}) },
		func() error { return c.SetVsock(ctx, fcapi.Vsock{CID: guestCID, Socket: vsockSocket}) },
		func() error { return l.addNetwork(ctx) },
		func() error { return c.AddEntropy(ctx) },
		func() error {
			if l.machine.HugePages {
				return nil // a balloon gives back pages of 4 KiB; and before 1.14 it is refused
			}
			return c.SetBalloon(ctx, balloon)
		},
		func() error { return c.Do(ctx, fcapi.InstanceStart) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// addNetwork adds the guest's interface. Every VM's TAP has the same name, so that a
// clone opens its own without being told.
func (l *launch) addNetwork(ctx context.Context) error {
	if l.net == nil {
		return nil
	}
	return l.client.AddNetworkInterface(ctx, fcapi.NetworkInterface{ID: "eth0", HostDevice: tapnet.Device, MAC: guestMAC})
}

// publish publishes the ports of a VM that is about to run.
func (l *launch) publish(ctx context.Context) error {
	if l.net == nil {
		return nil
	}
	return l.net.Publish(ctx, l.ports)
}

// explain adds to an error what Firecracker said before it ended, or hung.
func (l *launch) explain(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil && errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: firecracker hangs: %w\n%s", what, err, logs(l.place.Dir))
	}
	if errors.Is(err, fcapi.ErrClosed) {
		if said := vmlog.Tail(filepath.Join(l.place.Dir, vmmLog), l.said, 5); said != "" {
			return fmt.Errorf("%s: %w: %s", what, err, said)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// done makes the VM of a launch that succeeded.
func (l *launch) done(regions []vmm.Region) *vm {
	h := l.handle()
	h.Regions = regions
	v := &vm{VM: instance.New(l.proc, l.net, h), client: l.client}
	l.proc, l.client, l.net = nil, nil, nil
	return v
}

// handle is what is known of the VM before it runs.
func (l *launch) handle() vmm.Handle {
	h := vmm.Handle{Engine: Name, Dir: l.place.Dir, Runtime: l.place.Runtime}
	if l.jail != nil {
		h.Root = l.jail.Root()
	}
	return h
}

// close leaves nothing behind of a launch that failed; after done it only closes
// what the VM does not need.
func (l *launch) close(failed bool) {
	l.closeOwned()
	if l.jail != nil {
		l.jail.Close()
	}
	if l.client != nil {
		l.client.Close()
	}
	if l.proc != nil {
		_ = l.proc.Kill()
		<-l.proc.Done()
		_ = l.proc.Release()
	}
	if l.net != nil {
		l.net.End()
	}
	if failed {
		for _, name := range []string{apiSocket, vsockSocket, rootLink, logLink} {
			_ = os.Remove(filepath.Join(l.place.Runtime, name))
		}
		_ = jail.Remove(l.place.Dir)
	}
}

func (l *launch) closeOwned() {
	for _, f := range l.owned {
		_ = f.Close()
	}
	l.owned = nil
}
