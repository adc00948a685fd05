//go:build linux

package tapnet

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/process"
)

// Command is the hidden one of fcvm that this package starts: [Serve] or [Enter] follow.
const (
	Command = "vm-network"
	Serve   = "serve"
	Enter   = "enter"
)

// Flags of the commands: the numbers of descriptors, whether to be traced, and
// whether the guest reaches the host's loopback.
const (
	flagControl = "control"
	flagLink    = "link"
	flagTrace   = "trace"
	flagHost    = "host-loopback"
)

// socketName is the control socket's, in a VM's runtime directory.
const socketName = "net.sock"

// self is the program that runs, also when another one was installed under its
// name meanwhile.
const self = "/proc/self/exe"

// Network is the process that serves one VM's network. Its methods may be called
// concurrently.
type Network struct {
	proc   *process.Process // nil when it had ended before it was adopted
	handle vmm.NetworkHandle
	socket string
	link   *os.File // the VMM's end, until it has it

	done     chan struct{} // closed when both have ended
	released chan struct{}
	release  sync.Once
	watching sync.WaitGroup
}

// Start starts the process for a VM whose runtime directory this is, with a network that is
// one of a TAP. What goes wrong later is written to log. The caller calls End, or Follow once the VMM runs.
func Start(ctx context.Context, runtime string, kind vmm.Network, log *os.File) (_ *Network, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start the VM's network: %w", err)
		}
	}()
	n := newNetwork(runtime)
	if err := os.Remove(n.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove what an earlier VM left: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", n.socket)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	control, err := l.(*net.UnixListener).File()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours := os.NewFile(uintptr(pair[0]), "link")
	defer ours.Close()
	n.link = os.NewFile(uintptr(pair[1]), "link")

	cmd := exec.Command(self, Command, Serve, "--"+flagControl, "3", "--"+flagLink, "4")
	if kind == vmm.NetworkTAPHost {
		cmd.Args = append(cmd.Args, "--"+flagHost)
	}
	cmd.Args[0] = "fcvm"
	cmd.Dir = "/"
	cmd.Env = []string{"LC_ALL=C"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{control, ours}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	if err == nil {
		n.proc, err = process.Started(cmd)
	}
	if err != nil {
		_ = n.link.Close()
		return nil, err
	}
	n.handle = vmm.NetworkHandle{PID: n.proc.PID(), StartTime: n.proc.StartTime()}
	return n, nil
}

func newNetwork(runtime string) *Network {
	return &Network{socket: filepath.Join(runtime, socketName), done: make(chan struct{}), released: make(chan struct{})}
}

// Adopt finds the process of a VM that an earlier supervisor started. One that has ended is
// no error: the VM runs on without it.
func Adopt(h vmm.NetworkHandle, runtime string) (*Network, error) {
	n := newNetwork(runtime)
	n.handle = h
	p, err := process.Adopt(h.PID, h.StartTime)
	if err != nil && !errors.Is(err, process.ErrGone) {
		return nil, fmt.Errorf("adopt the VM's network: %w", err)
	}
	n.proc = p
	return n, nil
}

// Handle is what Adopt needs.
func (n *Network) Handle() vmm.NetworkHandle { return n.handle }

// Wrap has cmd, which is not started, begin in the network namespace. With traced it asks
// its parent to trace it right before it executes the VMM (attach.Config.Wrapped). The
// caller closes the returned file once cmd was started, or never will be.
func (n *Network) Wrap(cmd *exec.Cmd, traced bool) *os.File {
	cmd.ExtraFiles = append(cmd.ExtraFiles[:len(cmd.ExtraFiles):len(cmd.ExtraFiles)], n.link)
	args := []string{"fcvm", Command, Enter, "--" + flagLink, strconv.Itoa(2 + len(cmd.ExtraFiles))}
	if traced {
		args = append(args, "--"+flagTrace)
	}
	args = append(args, "--", cmd.Path)
	cmd.Args = append(args, cmd.Args[1:]...)
	cmd.Path = self
	attr := syscall.SysProcAttr{}
	if cmd.SysProcAttr != nil {
		attr = *cmd.SysProcAttr
	}
	attr.Cloneflags |= unix.CLONE_NEWNET
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		// Whoever has a user namespace may do in it what makes a network. Outside of it
		// the process is who it was.
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}
	}
	cmd.SysProcAttr = &attr
	return n.link
}

// Follow ends the process when the VMM has ended. Only then Done is closed.
func (n *Network) Follow(p *process.Process) {
	n.watching.Go(func() {
		select {
		case <-p.Done():
		case <-n.released:
			return
		}
		n.end()
		close(n.done)
	})
}

// end ends the process, which would notice by itself, and waits: its ports are free
// then.
func (n *Network) end() {
	if n.proc == nil {
		return
	}
	_ = n.proc.Kill()
	<-n.proc.Done()
}

// End ends the process of a VM that was not started after all.
func (n *Network) End() {
	n.end()
	_ = os.Remove(n.socket)
	n.Release()
}

// Done is closed when the followed VMM and then the process have ended; after
// Release perhaps never.
func (n *Network) Done() <-chan struct{} { return n.done }

// Release lets go of the process, which runs on. It is idempotent.
func (n *Network) Release() {
	n.release.Do(func() { close(n.released) })
	n.watching.Wait()
	if n.proc != nil {
		_ = n.proc.Release()
	}
}

// Request is what the process is asked for, one to a connection.
type Request struct {
	Publish []vmm.Port `json:"publish"`
}

// Reply answers a [Request].
type Reply struct {
	Error string `json:"error,omitempty"`
	// Taken says that the error is [network.ErrTaken].
	Taken bool `json:"taken,omitempty"`
}

// maxMessage bounds both, in bytes.
const maxMessage = 64 << 10

// Publish publishes all these ports or, with an error, none.
func (n *Network) Publish(ctx context.Context, ports []vmm.Port) error {
	if len(ports) == 0 {
		return nil
	}
	reply, err := n.ask(ctx, Request{Publish: ports})
	switch {
	case err != nil:
		return fmt.Errorf("publish ports: ask the VM's network, pid %d: %w", n.handle.PID, err)
	case reply.Taken:
		return &takenError{reply.Error}
	case reply.Error != "":
		return errors.New(reply.Error)
	}
	return nil
}

// takenError wraps [network.ErrTaken], whose text it already holds.
type takenError struct{ text string }

func (e *takenError) Error() string { return e.text }
func (*takenError) Unwrap() error   { return network.ErrTaken }

func (n *Network) ask(ctx context.Context, req Request) (Reply, error) {
	var reply Reply
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", n.socket)
	if err != nil {
		return reply, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := json.NewEncoder(c).Encode(req); err != nil {
		return reply, err
	}
	line, err := readLine(c)
	if err == nil {
		err = json.Unmarshal(line, &reply)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return reply, err
}

func readLine(c net.Conn) ([]byte, error) {
	line, err := bufio.NewReaderSize(c, maxMessage).ReadSlice('\n')
	if err != nil {
		return nil, fmt.Errorf("read message: %w", err)
	}
	return line, nil
}
