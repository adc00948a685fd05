//go:build linux

package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/buildinfo"
	"fcvm/internal/datadir"
	"fcvm/internal/guest/proto"
	"fcvm/internal/metrics"
)

// fake is a supervisor whose VMs are functions of the test: it answers the real
// API on the real socket, so that the CLI under test is the whole program.
type fake struct {
	// process is what runs in VMs that `run` starts.
	process func(p *fakeProcess)
	// runErr is what run answers; with blockRun it waits for its client to leave.
	runErr   error
	blockRun bool
	// breakLogs ends each log after this many records beyond those of the one
	// before, as a supervisor that dies does; 0 never.
	breakLogs int
	// exec is what runs for `exec`; execErr is answered instead, when not nil.
	exec    func(p *fakeProcess)
	execErr error
	// clones are answered in this order, then cloneErr.
	clones   []api.VM
	cloneErr error
	stats    api.Stats
	memory   api.MemoryMap
	mu       sync.Mutex
	vms      map[string]*fakeVM // guarded by mu, as all below
	runs     []api.RunRequest
	execs    []api.ExecRequest
	cloneReq []api.CloneRequest
	copied   map[string][]byte
	calls    []string
	logged   int
	// copyOut is the tar stream of copies out; what is copied in is kept.
	copyOut io.ReadCloser
	// began and left are closed when a blocked run begins, and when its client left.
	began, left chan struct{}
	// listed has something when VMs were listed.
	listed chan struct{}
}

type fakeVM struct {
	api.VM
	log    *pipeLog
	proc   *fakeProcess
	exited chan struct{}
}

// fakeProcess is what a process sees of the world.
type fakeProcess struct {
	stdin   *io.PipeReader
	in      *io.PipeWriter
	signals chan string
	sizes   chan [2]uint16
	write   func(s proto.Stream, data string)
	// frames is the raw stream of an exec, for what processes can't do.
	frames *proto.FrameWriter
	code   int
}

func newFakeProcess() *fakeProcess {
	r, w := io.Pipe()
	return &fakeProcess{stdin: r, in: w, signals: make(chan string, 16), sizes: make(chan [2]uint16, 16)}
}

// serve takes the frames of a client until it leaves.
func (p *fakeProcess) serve(r io.Reader) {
	defer func() { _ = p.in.Close() }()
	for {
		f, err := proto.ReadFrame(r, nil)
		if err != nil {
			return
		}
		switch f.Type {
		case proto.FrameStdin:
			_, _ = p.in.Write(f.Payload)
		case proto.FrameStdinEOF:
			_ = p.in.Close()
		case proto.FrameSignal:
			p.signals <- string(f.Payload)
		case proto.FrameResize:
			rows, cols, _ := f.Size()
			p.sizes <- [2]uint16{rows, cols}
		}
	}
}

// startFake serves the fake for a new data directory, with which the guest is
// set up, and returns that.
func startFake(t *testing.T, f *fake) *datadir.Layout {
	t.Helper()
	l := newLayout(t)
	f.vms, f.copied, f.began, f.left = map[string]*fakeVM{}, map[string][]byte{}, make(chan struct{}), make(chan struct{})
	f.listed = make(chan struct{}, 1)
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.NewServer(f, slog.New(slog.DiscardHandler)).Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("fake supervisor: %v", err)
		}
	})
	return l
}

func (f *fake) call(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, what)
}

func (f *fake) called() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// takeRuns returns the requests to run since the last call.
func (f *fake) takeRuns() []api.RunRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	runs := f.runs
	f.runs = nil
	return runs
}

// look calls see, which may look at what the fake has kept.
func (f *fake) look(see func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	see()
}

func (f *fake) find(name string) (*fakeVM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, vm := range f.vms {
		if vm.Name == name || vm.ID == name {
			return vm, nil
		}
	}
	return nil, &api.Error{Code: api.CodeNotFound, Message: "no such VM: " + name, Hint: "`fcvm ls -a` lists them"}
}

func (f *fake) Info(context.Context) api.ServerInfo {
	return api.ServerInfo{Version: buildinfo.Get(), PID: 1}
}

func (f *fake) Run(ctx context.Context, req api.RunRequest) (api.VM, error) {
	f.mu.Lock()
	f.runs = append(f.runs, req)
	f.mu.Unlock()
	if f.blockRun {
		f.mu.Lock()
		f.vms["1"] = &fakeVM{VM: api.VM{ID: "1", Name: "made-up", Image: req.Image, State: api.StateCreating, Created: time.Now()}}
		f.mu.Unlock()
		close(f.began)
		<-ctx.Done()
		close(f.left)
		<-f.listed
		f.mu.Lock()
		delete(f.vms, "1")
		f.mu.Unlock()
		return api.VM{}, ctx.Err()
	}
	if f.runErr != nil {
		return api.VM{}, f.runErr
	}
	name := req.Name
	if name == "" {
		name = "made-up"
	}
	p := newFakeProcess()
	vm := &fakeVM{
		VM: api.VM{
			ID: "0123456789ab", Name: name, Image: req.Image, State: api.StateRunning, TTY: req.TTY, OpenStdin: req.OpenStdin,
			Created: time.Now(), CPUs: int(req.CPUs), MemoryBytes: req.MemoryBytes, Ports: req.Ports,
		},
		log: newPipeLog(), proc: p, exited: make(chan struct{}),
	}
	p.write = func(s proto.Stream, data string) {
		vm.log.add(proto.LogRecord{Stream: s, Time: time.Unix(1700000000, 0), Data: []byte(data)})
	}
	f.mu.Lock()
	f.vms[vm.ID] = vm
	f.mu.Unlock()
	started := vm.VM
	go func() {
		if f.process != nil {
			f.process(p)
		}
		f.mu.Lock()
		vm.State, vm.ExitCode = api.StateExited, p.code
		f.mu.Unlock()
		vm.log.add(proto.LogRecord{Stream: proto.Exit, Time: time.Unix(1700000001, 0), ExitCode: p.code})
		vm.log.end()
		close(vm.exited)
	}()
	return started, nil
}

func (f *fake) Clone(_ context.Context, req api.CloneRequest, ready func(api.VM)) error {
	f.mu.Lock()
	f.cloneReq = append(f.cloneReq, req)
	f.mu.Unlock()
	for _, vm := range f.clones {
		ready(vm)
	}
	return f.cloneErr
}

func (f *fake) List(context.Context) []api.VM {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []api.VM
	for _, vm := range f.vms {
		l = append(l, vm.VM)
	}
	select {
	case f.listed <- struct{}{}:
	default:
	}
	return l
}

func (f *fake) Get(_ context.Context, name string) (api.VM, error) {
	vm, err := f.find(name)
	if err != nil {
		return api.VM{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return vm.VM, nil
}

func (f *fake) Stop(_ context.Context, name string, timeout time.Duration) error {
	f.call("stop " + name + " " + timeout.String())
	_, err := f.find(name)
	return err
}

func (f *fake) Kill(_ context.Context, name, signal string) error {
	vm, err := f.find(name)
	if err != nil {
		return err
	}
	f.call("kill " + signal)
	vm.proc.signals <- signal
	return nil
}

func (f *fake) Remove(_ context.Context, name string, force bool) error {
	vm, err := f.find(name)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.vms, vm.ID)
	return nil
}

func (f *fake) Wait(ctx context.Context, name string) (api.VM, error) {
	vm, err := f.find(name)
	if err != nil {
		return api.VM{}, err
	}
	select {
	case <-vm.exited:
	case <-ctx.Done():
		return api.VM{}, ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return vm.VM, nil
}

func (f *fake) Pause(_ context.Context, name string) error  { f.call("pause " + name); return nil }
func (f *fake) Resume(_ context.Context, name string) error { f.call("resume " + name); return nil }

func (f *fake) Exec(_ context.Context, name string, req api.ExecRequest) (io.ReadWriteCloser, error) {
	f.mu.Lock()
	f.execs = append(f.execs, req)
	f.mu.Unlock()
	if f.execErr != nil {
		return nil, f.execErr
	}
	p := newFakeProcess()
	ours, theirs := net.Pipe()
	p.frames = proto.NewFrameWriter(ours)
	p.write = func(s proto.Stream, data string) {
		t := proto.FrameStdout
		if s == proto.Stderr {
			t = proto.FrameStderr
		}
		_ = p.frames.Write(t, []byte(data))
	}
	go p.serve(ours)
	go func() {
		defer ours.Close()
		f.exec(p)
		if p.code >= 0 {
			_ = p.frames.Exit(p.code)
		}
	}()
	return theirs, nil
}

func (f *fake) Attach(_ context.Context, name string) (io.ReadWriteCloser, error) {
	vm, err := f.find(name)
	if err != nil {
		return nil, err
	}
	ours, theirs := net.Pipe()
	go vm.proc.serve(ours)
	go func() {
		<-vm.exited
		_ = ours.Close()
	}()
	return theirs, nil
}

func (f *fake) Logs(ctx context.Context, name string, req api.LogsRequest, begin func() io.Writer) error {
	vm, err := f.find(name)
	if err != nil {
		return err
	}
	w := begin()
	stop := context.AfterFunc(ctx, vm.log.end)
	defer stop()
	f.mu.Lock()
	f.logged++
	last := f.breakLogs * f.logged
	f.mu.Unlock()
	for i := 0; last == 0 || i < last; i++ {
		b, ok := vm.log.get(i, req.Follow)
		if !ok {
			return nil
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) CopyIn(_ context.Context, name, path string, tar io.Reader) error {
	b, err := io.ReadAll(tar)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.copied[name+":"+path] = b
	return nil
}

func (f *fake) CopyOut(_ context.Context, name, path string) (io.ReadCloser, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.copyOut == nil {
		return nil, &api.Error{Code: api.CodeNotFound, Message: "no such file: " + path}
	}
	return f.copyOut, nil
}

func (f *fake) setCopyOut(r io.ReadCloser) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.copyOut = r
}

func (f *fake) Stats(_ context.Context, name string) (api.Stats, error) {
	st := f.stats
	if name != "" {
		st.VMs = slices.DeleteFunc(slices.Clone(st.VMs), func(vm api.VMStats) bool { return vm.Name != name && vm.ID != name })
	}
	return st, nil
}

func (f *fake) Metrics(context.Context) ([]byte, error) {
	return metrics.Text("1.0", nil, f.stats), nil
}

func (f *fake) MemoryMap(_ context.Context, name string) (api.MemoryMap, error) {
	_, err := f.find(name)
	return f.memory, err
}

func (f *fake) Snapshot(_ context.Context, req api.SnapshotRequest) (api.SnapshotResult, error) {
	if _, err := f.find(req.VM); err != nil {
		return api.SnapshotResult{}, err
	}
	return api.SnapshotResult{Name: req.Name, PauseMillis: 12.34, TotalMillis: 100, PrivateBytes: 1 << 20}, nil
}

// pipeLog is a log that grows.
type pipeLog struct {
	mu    sync.Mutex
	grown *sync.Cond
	recs  [][]byte // guarded by mu
	ended bool     // guarded by mu
}

func newPipeLog() *pipeLog {
	l := &pipeLog{}
	l.grown = sync.NewCond(&l.mu)
	return l
}

func (l *pipeLog) add(r proto.LogRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recs = append(l.recs, proto.AppendLogRecord(nil, r))
	l.grown.Broadcast()
}

func (l *pipeLog) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.grown.Broadcast()
}

func (l *pipeLog) get(i int, wait bool) ([]byte, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i >= len(l.recs) && wait && !l.ended {
		l.grown.Wait()
	}
	if i >= len(l.recs) {
		return nil, false
	}
	return l.recs[i], true
}
