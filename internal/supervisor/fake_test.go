package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/link"
	"fcvm/internal/guest/proto"
	"fcvm/internal/vmm"
)

// fakeEngine is an engine whose VMs are goroutines of this process, with real
// memory, a real link to an agent, real leases and real log files. Its VMs live
// on when a supervisor of the test does not.
type fakeEngine struct {
	mu  sync.Mutex
	vms map[uint64]*fakeVM // by start time; guarded by mu
	n   uint64
	// version is what Info tells.
	version string
	// huge says that it has huge pages.
	huge bool
	// hook is called before each step with its name; an error makes it fail.
	hook func(step string, vm *fakeVM) error // guarded by mu
}

func newFakeEngine() *fakeEngine {
	return &fakeEngine{vms: map[uint64]*fakeVM{}, version: "1.0"}
}

func (e *fakeEngine) setHook(f func(step string, vm *fakeVM) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.hook = f
}

// failAt makes one step fail, every time.
func (e *fakeEngine) failAt(step string, err error) {
	e.setHook(func(s string, _ *fakeVM) error {
		if s == step {
			return err
		}
		return nil
	})
}

func (e *fakeEngine) step(name string, vm *fakeVM) error {
	e.mu.Lock()
	hook := e.hook
	e.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(name, vm)
}

// running returns the VMs whose process has not ended.
func (e *fakeEngine) running() []*fakeVM {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*fakeVM
	for _, v := range e.vms {
		select {
		case <-v.done:
		default:
			all = append(all, v)
		}
	}
	return all
}

func (e *fakeEngine) byID(t testing.TB, id string) *fakeVM {
	t.Helper()
	for _, v := range e.running() {
		if v.place.ID == id {
			return v
		}
	}
	t.Fatalf("VM %s does not run", id)
	return nil
}

func (e *fakeEngine) Info(context.Context) (vmm.Info, error) {
	if err := e.step("info", nil); err != nil {
		return vmm.Info{}, err
	}
	return vmm.Info{Name: "fake", Version: e.version, Accel: "none", CPU: "none", Network: true, HugePages: e.huge}, nil
}

func (e *fakeEngine) Boot(ctx context.Context, c vmm.BootConfig) (vmm.VM, error) {
	if err := e.step("boot", nil); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return e.start(c.Place, c.Machine, nil, &fakeVM{ports: c.Ports})
}

func (e *fakeEngine) Restore(ctx context.Context, c vmm.RestoreConfig) (vmm.VM, error) {
	step := "restore-" + string(c.Memory.Backend)
	if c.Paused {
		step = "ahead-" + string(c.Memory.Backend)
	}
	if err := e.step(step, nil); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(c.State)
	if err != nil {
		return nil, err
	}
	var st fakeState
	if err := json.Unmarshal(b, &st); err != nil {
		return nil, err
	}
	return e.start(c.Place, c.Machine, c.Memory.File, &fakeVM{state: st, paused: c.Paused, ports: c.Ports})
}

func (e *fakeEngine) start(p vmm.Place, m vmm.Machine, mem *os.File, v *fakeVM) (vmm.VM, error) {
	v.eng, v.place, v.machine, v.done, v.links = e, p, m, make(chan struct{}), map[net.Conn]bool{}
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_NORESERVE|unix.MAP_ANONYMOUS
	if mem != nil {
		fd, flags = int(mem.Fd()), unix.MAP_PRIVATE|unix.MAP_NORESERVE
	}
	var err error
	if v.mem, err = unix.Mmap(fd, 0, int(m.MemoryBytes), unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return nil, err
	}
	if p.Jail {
		if err := os.MkdirAll(filepath.Join(p.Dir, "jail", "fake", p.ID, "root"), 0o700); err != nil {
			return nil, err
		}
	}
	for _, f := range p.Inherit {
		d, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		v.inherit = append(v.inherit, d)
	}
	if v.log, err = os.OpenFile(filepath.Join(p.Dir, containerLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(p.Runtime, "agent.sock"), nil, 0o600); err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.n++
	v.start = e.n
	e.vms[e.n] = v
	e.mu.Unlock()
	return v, nil
}

func (e *fakeEngine) Adopt(_ context.Context, h vmm.Handle) (vmm.VM, error) {
	e.mu.Lock()
	v := e.vms[h.StartTime]
	e.mu.Unlock()
	if v == nil {
		return nil, vmm.ErrGone
	}
	select {
	case <-v.done:
		return nil, vmm.ErrGone
	default:
		return v, nil
	}
}

// fakeState is the fake's device state.
type fakeState struct {
	Args []string
	Note string
}

type fakeVM struct {
	eng     *fakeEngine
	place   vmm.Place
	machine vmm.Machine
	mem     []byte
	inherit []int
	log     *os.File
	start   uint64
	done    chan struct{}

	mu       sync.Mutex
	state    fakeState         // guarded by mu
	identity proto.Identity    // guarded by mu
	paused   bool              // guarded by mu
	ports    []vmm.Port        // guarded by mu
	pauses   int               // guarded by mu
	links    map[net.Conn]bool // guarded by mu
	over     bool              // guarded by mu
}

func (v *fakeVM) Handle() vmm.Handle {
	return vmm.Handle{
		Engine: "fake", PID: os.Getpid(), StartTime: v.start, Dir: v.place.Dir, Runtime: v.place.Runtime,
		Regions: []vmm.Region{{Addr: addrOf(v.mem), Size: int64(len(v.mem))}},
	}
}

func (v *fakeVM) Pause(context.Context) error {
	err := v.eng.step("pause", v)
	v.mu.Lock()
	defer v.mu.Unlock()
	// A pause that fails may have happened all the same.
	v.paused = true
	v.pauses++
	return err
}

func (v *fakeVM) Resume(ctx context.Context) error {
	if err := errors.Join(v.eng.step("resume", v), ctx.Err()); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = false
	return nil
}

func (v *fakeVM) Publish(_ context.Context, ports []vmm.Port) error {
	if err := v.eng.step("publish", v); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ports = append(v.ports, ports...)
	return nil
}

func (v *fakeVM) isPaused() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.paused
}

// who is the guest's identity, with the time that its clock was set to.
func (v *fakeVM) who() proto.Identity {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.identity
}

func (v *fakeVM) SaveState(_ context.Context, path string) error {
	if !v.isPaused() {
		return errors.New("state of a VM that is not paused")
	}
	v.mu.Lock()
	b, err := json.Marshal(v.state)
	v.mu.Unlock()
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return err
	}
	return v.eng.step("save", v)
}

func (v *fakeVM) DialAgent(context.Context) (net.Conn, error) {
	if err := v.eng.step("dial", v); err != nil {
		return nil, err
	}
	host, guest, err := socketPair()
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.over {
		return nil, errors.Join(vmm.ErrGone, host.Close(), guest.Close())
	}
	v.links[guest] = true
	go func() {
		_ = link.NewGuest(fakePort{guest}, fakeAgent{v}).Serve()
		_ = guest.Close()
	}()
	return host, nil
}

// hangUp ends the connections to the agent.
func (v *fakeVM) hangUp() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for c := range v.links {
		_ = c.Close()
	}
}

func (v *fakeVM) Balloon(context.Context, int64) error { return nil }
func (v *fakeVM) Done() <-chan struct{}                { return v.done }
func (v *fakeVM) Tail() string                         { return "last words of the console" }
func (v *fakeVM) Release() error                       { return nil }

func (v *fakeVM) Kill() error {
	v.end()
	return nil
}

// end is the end of the VMM's process: the kernel takes back all it had.
func (v *fakeVM) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.over {
		return
	}
	v.over = true
	for _, fd := range v.inherit {
		_ = unix.Close(fd)
	}
	for c := range v.links {
		_ = c.Close()
	}
	_ = v.log.Close()
	_ = unix.Munmap(v.mem)
	close(v.done)
}

// exit is the end of the container's process, and with it of the VM.
func (v *fakeVM) exit(code int) {
	v.print(proto.LogRecord{Stream: proto.Exit, ExitCode: code})
	v.end()
}

func (v *fakeVM) print(r proto.LogRecord) {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	_ = proto.WriteLogRecord(v.log, r)
}

func (v *fakeVM) write(off int, s string) { copy(v.mem[off:], s) }

func (v *fakeVM) read(off, n int) string { return string(v.mem[off : off+n]) }

// fakeAgent is the fake's agent.
type fakeAgent struct{ v *fakeVM }

func (a fakeAgent) Handle(conn net.Conn) { a.v.handle(conn) }
func (fakeAgent) BeforeSnapshot()        {}
func (fakeAgent) AfterSnapshot()         {}

func (a fakeAgent) Identify(b []byte) error {
	if err := a.v.eng.step("identify", a.v); err != nil {
		return err
	}
	id, err := proto.ParseIdentity(b)
	if err != nil {
		return err
	}
	a.v.mu.Lock()
	defer a.v.mu.Unlock()
	if len(id.Entropy) == 0 && id.Hostname == "" { // the clock, once more
		a.v.identity.Wall = id.Wall
		return nil
	}
	a.v.identity = id
	return nil
}

// handle serves a request. The container's command is a word and its
// arguments; see run.
func (v *fakeVM) handle(conn net.Conn) {
	defer conn.Close()
	var req proto.Request
	if proto.ReadMessage(conn, &req) != nil {
		return
	}
	w := proto.NewFrameWriter(conn)
	if err := v.eng.step(string(req.Method), v); err != nil {
		_ = w.Fail(&proto.Error{Code: 125, Message: err.Error()})
		return
	}
	answer := func() { _ = proto.WriteMessage(conn, proto.Empty{}) }
	switch req.Method {
	case proto.MethodClock:
		v.mu.Lock()
		v.identity.Wall = req.Wall
		v.mu.Unlock()
		answer()
	case proto.MethodStart:
		v.mu.Lock()
		v.state.Args = req.Start.Args
		v.mu.Unlock()
		switch req.Start.Args[0] {
		case "nosuch":
			_ = w.Fail(&proto.Error{Code: 127, Message: "nosuch: not found"})
			return
		case "exit-unanswered":
			v.exit(3)
			return
		}
		answer()
		v.run(req.Start)
	case proto.MethodSignal:
		v.mu.Lock()
		deaf := len(v.state.Args) > 0 && v.state.Args[0] == "deaf"
		v.mu.Unlock()
		answer()
		n := unix.SignalNum("SIG" + strings.TrimPrefix(req.Signal, "SIG"))
		if !deaf || n == syscall.SIGKILL {
			v.exit(128 + int(n))
		}
	case proto.MethodExec:
		_ = w.Write(proto.FrameReady, nil)
		_ = w.Write(proto.FrameStdout, []byte(strings.Join(req.Exec.Args, " ")+"|"+strings.Join(req.Exec.Env, ",")))
		_ = w.Exit(5)
	case proto.MethodAttach:
		_ = w.Write(proto.FrameReady, nil)
		for {
			f, err := proto.ReadFrame(conn, nil)
			if err != nil {
				return
			}
			if f.Type == proto.FrameStdin {
				_ = w.Write(proto.FrameStdout, f.Payload)
			}
		}
	}
}

func (v *fakeVM) run(spec *proto.ContainerSpec) {
	switch spec.Args[0] {
	case "exit":
		code, _ := strconv.Atoi(spec.Args[1])
		v.print(proto.LogRecord{Stream: proto.Stdout, Data: []byte("bye\n")})
		v.exit(code)
	case "crash":
		v.end()
	}
}

// socketPair is a port as QEMU has it: what one end writes does not wait until the
// other one reads, as with net.Pipe, where two that write wait for each other.
func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "port")
		var ferr error
		ends[i], ferr = net.FileConn(f)
		err = errors.Join(err, ferr, f.Close())
	}
	return ends[0], ends[1], err
}

// fakePort is a guest's port whose host comes once.
type fakePort struct{ net.Conn }

func (p fakePort) Interrupt() { _ = p.SetWriteDeadline(time.Unix(1, 0)) }
func (p fakePort) Restore()   { _ = p.SetWriteDeadline(time.Time{}) }

// sorted returns the names of the entries of a directory.
func sorted(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}

// readFrames reads a stream to its end and returns its output and exit code.
func readFrames(t testing.TB, r io.Reader) (out string, code int) {
	t.Helper()
	code = -1
	for {
		f, err := proto.ReadFrame(r, nil)
		if err != nil {
			return out, code
		}
		switch f.Type {
		case proto.FrameStdout, proto.FrameStderr:
			out += string(f.Payload)
		case proto.FrameExit:
			if code, err = f.ExitCode(); err != nil {
				t.Fatal(err)
			}
			return out, code
		}
	}
}
