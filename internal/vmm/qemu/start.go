package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/instance"
	"fcvm/internal/vmm/process"
	"fcvm/internal/vmm/qemu/qmp"
)

// launch is a QEMU that is being started. Its steps are: open, then add, then
// run, then commands; close undoes all of it, done lets the VM live.
type launch struct {
	m      machine
	binary string
	files  []*os.File // fd 3 and up in the child
	owned  []*os.File // ours to close when the child has its copies
	conn   net.Conn   // to QMP, waiting to be accepted
	agent  net.Conn   // to the agent's port, likewise
	proc   *process.Process
	net    *tapnet.Network // nil without a TAP
	traced bool            // by attach, which starts QEMU then
	client *qmp.Client
	resume chan struct{} // gets one when the guest begins to run
	said   int64         // size of QEMU's log before it was started
}

// firstFD is where files begin in a child; os/exec.
const firstFD = 3

// open makes the sockets and connects to the first of them, so that nothing
// has to be tried again until QEMU is there.
func (l *launch) open(ctx context.Context) error {
	qmpL, err := l.listen(qmpSocket)
	if err != nil {
		return err
	}
	agentL, err := l.listen(agentSocket)
	if err != nil {
		return err
	}
	l.m.qmpFD, l.m.agentFD = l.add(qmpL), l.add(agentL)
	for _, f := range l.m.Inherit {
		l.add(f)
	}
	var d net.Dialer
	l.conn, err = d.DialContext(ctx, "unix", filepath.Join(l.m.Runtime, qmpSocket))
	if err != nil {
		return fmt.Errorf("connect to QEMU's socket: %w", err)
	}
	// A port that is connected before the device state is loaded is so as the
	// guest remembers it: no event of a host that went away and came back, for
	// which a clone would run its driver and its agent before it is asked anything.
	l.agent, err = d.DialContext(ctx, "unix", filepath.Join(l.m.Runtime, agentSocket))
	if err != nil {
		return fmt.Errorf("connect to the agent's port: %w", err)
	}
	return nil
}

// listen makes a listening socket that QEMU will accept from. An earlier start
// in the same place may have left one.
func (l *launch) listen(name string) (*os.File, error) {
	path := filepath.Join(l.m.Runtime, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	l.owned = append(l.owned, f)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("bind socket %s: %w", path, err)
	}
	// QEMU serves one connection; the others wait here.
	if err := unix.Listen(fd, 16); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return f, nil
}

// add gives the child a file, and returns its number there.
func (l *launch) add(f *os.File) int {
	l.files = append(l.files, f)
	return firstFD + len(l.files) - 1
}

// command is QEMU's, not started. It runs in a session of its own, because it
// outlives this process and must not get the terminal's signals.
func (l *launch) command(ctx context.Context) (*exec.Cmd, error) {
	args, err := l.m.args()
	if err != nil {
		return nil, err
	}
	out, err := os.OpenFile(filepath.Join(l.m.Dir, vmmLog), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	l.owned = append(l.owned, out)
	if info, err := out.Stat(); err == nil {
		l.said = info.Size()
	}
	cmd := exec.Command(l.binary, args...)
	cmd.Dir = "/"
	cmd.Env = environment()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = l.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if l.m.Network.TAP() {
		if l.net, err = tapnet.Start(ctx, l.m.Runtime, l.m.Network, out); err != nil {
			return nil, err
		}
		l.owned = append(l.owned, l.net.Wrap(cmd, l.traced))
	}
	return cmd, nil
}

// environment is what QEMU needs of ours: nothing that may hold a secret.
func environment() []string {
	env := []string{"LC_ALL=C"}
	for _, k := range []string{"PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// run starts QEMU by start, and takes over its process.
func (l *launch) run(ctx context.Context, start func(*exec.Cmd) error) error {
	cmd, err := l.command(ctx)
	if err != nil {
		return err
	}
	if err := start(cmd); err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	if l.proc, err = process.Started(cmd); err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	// From here on only QEMU holds the sockets: when it ends, so do they.
	l.closeOwned()
	return nil
}

// publish publishes the ports of a VM on a TAP. QEMU's own network has them on its
// command line.
func (l *launch) publish(ctx context.Context) error {
	if l.net == nil {
		return nil
	}
	return l.net.Publish(ctx, l.m.ports)
}

func startPlain(cmd *exec.Cmd) error { return cmd.Start() }

// connect waits until QEMU answers, and returns its run state.
func (l *launch) connect(ctx context.Context) (string, error) {
	l.resume = make(chan struct{}, 1)
	conn := l.conn
	l.conn = nil
	client, err := qmp.New(ctx, conn, func(e qmp.Event) {
		if e.Name != "RESUME" {
			return
		}
		select {
		case l.resume <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return "", l.explain(ctx, err)
	}
	l.client = client
	status, err := runState(ctx, client)
	return status, l.explain(ctx, err)
}

func runState(ctx context.Context, c *qmp.Client) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	if err := c.Do(ctx, "query-status", nil, &s); err != nil {
		return "", err
	}
	return s.Status, nil
}

// running waits until the guest runs, which an incoming one does by itself as
// soon as its state is loaded. Where loading fails, QEMU ends.
func (l *launch) running(ctx context.Context, status string) error {
	switch status {
	case "running":
		return nil
	case "inmigrate":
	default:
		return fmt.Errorf("start qemu: the guest is %q instead of running", status)
	}
	select {
	case <-l.resume:
		return nil
	case <-l.client.Done():
		return l.explain(ctx, qmp.ErrClosed)
	case <-ctx.Done():
		return l.explain(ctx, fmt.Errorf("load state: %w", context.Cause(ctx)))
	}
}

// loaded waits until the state is loaded of a guest that is to stay paused. No
// event tells of it; but QEMU loads in one go between two commands, so that the
// second question is already answered after it.
func (l *launch) loaded(ctx context.Context, status string) error {
	for status == "inmigrate" {
		var err error
		if status, err = runState(ctx, l.client); err != nil {
			return l.explain(ctx, err)
		}
	}
	if status != "paused" {
		return fmt.Errorf("start qemu: the guest is %q instead of paused", status)
	}
	return nil
}

// explain adds to an error of QMP what QEMU said before it ended, or hung. The
// end of a connection and that of its process are told apart by a moment only.
func (l *launch) explain(ctx context.Context, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("start qemu: it hangs: %w\n%s", err, logs(l.m.Dir))
	}
	if err == nil || !errors.Is(err, qmp.ErrClosed) {
		return err
	}
	if waitErr := l.proc.Wait(ctx); waitErr != nil {
		return errors.Join(err, waitErr)
	}
	return l.ended()
}

// ended is the error of a QEMU that ended too early.
func (l *launch) ended() error {
	said := tail(filepath.Join(l.m.Dir, vmmLog), l.said, 5)
	if portErr := explainPort(l.m.ports, said); portErr != nil {
		return portErr
	}
	if said == "" {
		return errors.New("start qemu: it ended without a word")
	}
	return fmt.Errorf("start qemu: it ended: %s", said)
}

// done makes the VM of a launch that succeeded.
func (l *launch) done(regions []vmm.Region) *vm {
	h := vmm.Handle{Engine: Name, Dir: l.m.Dir, Runtime: l.m.Runtime, Regions: regions}
	v := &vm{VM: instance.New(l.proc, l.net, h), client: l.client, agent: l.agent}
	l.proc, l.client, l.agent, l.net = nil, nil, nil, nil
	return v
}

// close leaves nothing behind of a launch that failed; after done it only
// closes what the VM does not need.
func (l *launch) close(failed bool) {
	l.closeOwned()
	if l.conn != nil {
		_ = l.conn.Close()
	}
	if l.agent != nil {
		_ = l.agent.Close()
	}
	if l.client != nil {
		_ = l.client.Close()
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
		_ = os.Remove(filepath.Join(l.m.Runtime, qmpSocket))
		_ = os.Remove(filepath.Join(l.m.Runtime, agentSocket))
	}
}

func (l *launch) closeOwned() {
	for _, f := range l.owned {
		_ = f.Close()
	}
	l.owned = nil
}
