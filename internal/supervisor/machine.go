package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/guest/agent"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/jail"
)

// machine is a VM as the supervisor knows it, from the moment that its name is
// taken until it is removed.
type machine struct {
	s        *Supervisor
	id, name string
	created  time.Time

	// begun cancels the creation, with a reason; a no-op afterwards.
	begun  context.Context
	cancel context.CancelCauseFunc

	// op is held (one slot) by what must not happen to one VM at the same time:
	// pause, resume and snapshot.
	op chan struct{}
	// connecting is held (one slot) by who makes the connection to the agent.
	connecting chan struct{}
	// exited is closed when the VM has ended and that is on record, or when its
	// creation failed; gone when it is no longer in the tables.
	exited chan struct{}
	gone   chan struct{}

	// spare is the VMM that was started ahead for it, until the creation uses it.
	spare *spare
	// kin is the pool of spares that it keeps alive, until it has ended.
	kin *pool

	mu      sync.Mutex
	rec     record        // guarded by mu
	vm      vmm.VM        // guarded by mu; nil before the start and after the end
	agent   *agent.Client // guarded by mu; nil until connected
	server  *server       // guarded by mu; the page server that it holds, or nil
	waiters int           // guarded by mu: calls of Wait, and open logs
	removed bool          // guarded by mu
}

func newMachine(s *Supervisor, rec record) *machine {
	m := &machine{
		s: s, id: rec.VM.ID, name: rec.VM.Name, created: rec.VM.Created, rec: rec,
		op: make(chan struct{}, 1), connecting: make(chan struct{}, 1),
		exited: make(chan struct{}), gone: make(chan struct{}),
	}
	m.begun, m.cancel = context.WithCancelCause(s.life)
	return m
}

func (m *machine) dir() string     { return m.s.o.Layout.VM(m.id) }
func (m *machine) runtime() string { return m.s.o.Layout.VMRuntime(m.id) }
func (m *machine) logFile() string { return filepath.Join(m.dir(), containerLog) }

// view returns what the API tells of the VM.
func (m *machine) view() api.VM {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.rec.VM
	if vm.Ports == nil {
		vm.Ports = []vmm.Port{}
	}
	return vm
}

// live says whether the VM runs, or is about to.
func (m *machine) live() bool {
	select {
	case <-m.exited:
		return false
	default:
		return true
	}
}

// update changes the record and writes it.
func (m *machine) update(change func(r *record)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.removed {
		return fmt.Errorf("VM %s was removed: %w", m.name, vmm.ErrGone)
	}
	change(&m.rec)
	return m.rec.save(m.dir())
}

// lock takes a one-slot lock unless ctx ends first.
func lock(ctx context.Context, slot chan struct{}) error {
	select {
	case slot <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func unlock(slot chan struct{}) { <-slot }

// running returns the VM of a machine that was created and has not ended.
func (m *machine) running() (vmm.VM, api.State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch st := m.rec.VM.State; st {
	case api.StateRunning, api.StatePaused:
		if m.vm != nil {
			return m.vm, st, nil
		}
		return nil, st, wrongState("VM %s is ending", m.name)
	case api.StateCreating:
		return nil, st, wrongState("VM %s is still starting", m.name)
	default:
		return nil, st, wrongState("VM %s is not running", m.name)
	}
}

// prepare makes the VM's directories and its first record.
func (m *machine) prepare() error {
	for _, d := range []string{m.dir(), m.runtime()} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make VM's directory: %w", err)
		}
	}
	return m.update(func(*record) {})
}

// started records the VMM that now runs.
func (m *machine) started(vm vmm.VM) error {
	h := vm.Handle()
	return m.update(func(r *record) {
		m.vm = vm
		r.Handle = &h
		r.VM.PID = h.PID
	})
}

// ready ends the creation: the VM runs from here on, whatever becomes of the
// request. The timing goes into the log.
func (m *machine) ready(begun time.Time, timing ...any) error {
	if err := context.Cause(m.begun); err != nil {
		return err // it was stopped or removed at the last moment
	}
	now := time.Now()
	err := m.update(func(r *record) {
		r.VM.State = api.StateRunning
		r.VM.Started = &now
		r.VM.ReadyMillis = float64(now.Sub(begun).Microseconds()) / 1000
	})
	if err != nil {
		return err
	}
	m.s.spawn(m.watch)
	vm := m.view()
	m.s.log.Info("VM runs", append([]any{
		"vm", m.name, "id", m.id, "pid", vm.PID, "engine", vm.Engine, "accel", vm.Accel,
		"snapshot", vm.Snapshot, "backend", vm.MemBackend, "policy", vm.Policy, "ready_ms", vm.ReadyMillis,
	}, timing...)...)
	return nil
}

// abandon ends a creation that failed: nothing of it is left.
func (m *machine) abandon() {
	m.mu.Lock()
	vm, ag := m.vm, m.agent
	m.vm, m.agent = nil, nil
	m.mu.Unlock()
	if ag != nil {
		_ = ag.Close()
	}
	if vm != nil {
		end(vm)
	}
	if m.spare != nil {
		m.spare.end()
	}
	m.leaveKin()
	m.letServerGo()
	m.s.claims.Release(m.name)
	m.mu.Lock()
	m.rec.VM.State = api.StateExited
	m.rec.VM.PID = 0
	m.mu.Unlock()
	close(m.exited)
	if err := m.erase(); err != nil {
		m.s.log.Error("removing what a failed start left", "vm", m.name, "error", err)
	}
}

// leaveKin ends the spares of its kind with the last clone.
func (m *machine) leaveKin() {
	if m.kin != nil {
		m.s.spares.leave(m.kin)
	}
}

// end kills a VM and waits for its end, which the kernel owes.
func end(vm vmm.VM) {
	_ = vm.Kill()
	<-vm.Done()
}

// erase removes an ended VM's files and takes it out of the tables. It is
// idempotent.
func (m *machine) erase() error {
	m.mu.Lock()
	again := m.removed
	m.removed = true
	m.mu.Unlock()
	if again {
		<-m.gone
		return nil
	}
	err := errors.Join(os.RemoveAll(m.runtime()), jail.Remove(m.dir()), os.RemoveAll(m.dir()))
	m.cancel(nil)
	m.s.forget(m)
	close(m.gone)
	return err
}

// release lets go of a VM that runs on, and says whether it does.
func (m *machine) release() bool {
	m.mu.Lock()
	vm, ag := m.vm, m.agent
	m.vm, m.agent = nil, nil
	m.mu.Unlock()
	m.cancel(nil)
	if ag != nil {
		_ = ag.Close()
	}
	if vm == nil {
		return false
	}
	_ = vm.Release()
	return true
}

// client returns a connection to the guest's agent, and makes one where there is
// none or it broke.
func (m *machine) client(ctx context.Context) (*agent.Client, error) {
	vm, state, err := m.running()
	if err != nil {
		return nil, err
	}
	if state == api.StatePaused {
		return nil, wrongState("VM %s is paused; `fcvm resume %s` lets it go on", m.name, m.name)
	}
	return m.connect(ctx, vm, agentTimeout)
}

func (m *machine) connect(ctx context.Context, vm vmm.VM, timeout time.Duration) (*agent.Client, error) {
	if err := lock(ctx, m.connecting); err != nil {
		return nil, err
	}
	defer unlock(m.connecting)
	m.mu.Lock()
	c := m.agent
	m.mu.Unlock()
	if c != nil {
		select {
		case <-c.Done():
			_ = c.Close()
		default:
			return c, nil
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errNoAnswer{timeout})
	defer cancel()
	ctx, stop := untilDone(ctx, vm)
	defer stop()
	conn, err := vm.DialAgent(ctx)
	if err != nil {
		return nil, because(ctx, fmt.Errorf("reach the agent of VM %s: %w", m.name, err))
	}
	if c, err = agent.Connect(ctx, conn); err != nil {
		return nil, because(ctx, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vm != vm { // it ended, or we let go of it
		_ = c.Close()
		return nil, wrongState("VM %s is not running", m.name)
	}
	m.agent = c
	return c, nil
}

// errNoAnswer says that a guest did not answer in time.
type errNoAnswer struct{ after time.Duration }

func (e errNoAnswer) Error() string {
	return fmt.Sprintf("the guest did not answer within %v", e.after)
}

// errEnded says that the VMM ended.
var errEnded = fmt.Errorf("the VM ended: %w", vmm.ErrGone)

// untilDone returns a context that also ends with the VM. The caller calls stop.
func untilDone(ctx context.Context, vm vmm.VM) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		select {
		case <-vm.Done():
			cancel(errEnded)
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-finished
	}
}

// because prefers the reason for which a context ended to what broke off.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && err != nil {
		return cause
	}
	return err
}

// List implements [api.Backend].
func (s *Supervisor) List(context.Context) []api.VM {
	ms := s.machines()
	vms := make([]api.VM, 0, len(ms))
	for _, m := range ms {
		vms = append(vms, m.view())
	}
	return vms
}

// Get implements [api.Backend].
func (s *Supervisor) Get(_ context.Context, name string) (api.VM, error) {
	m, err := s.find(name)
	if err != nil {
		return api.VM{}, err
	}
	return m.view(), nil
}
