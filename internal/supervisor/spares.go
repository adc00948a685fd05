package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/jail"
)

// spares holds VMMs that were started ahead: a spare has loaded a snapshot, and its
// guest waits, paused, for a clone that wants the same. Most of what a clone costs
// is then behind it.
//
// A spare is nobody's VM. It has no record, so that the next supervisor ends what
// it finds of it, and it lives only as long as a clone of its kind does: a
// snapshot without clones can be removed.
type spares struct {
	s *Supervisor
	// max is the number of spares of one kind.
	max int

	mu     sync.Mutex
	byKind map[kind]*pool // guarded by mu
	closed bool           // guarded by mu: no new ones, the supervisor ends
}

// kind is what a spare and the clone that takes it must have in common. All else of
// a clone is decided later.
type kind struct {
	serverKey
	backend string
	merge   bool
	jail    bool
}

// pool is what there is of one kind. All of it is guarded by spares.mu.
type pool struct {
	kind   kind
	clones int      // that live or are being made
	spares []*spare // the oldest first, also those that still start
	// failed is set when one could not be started: the next could not either.
	failed bool
}

// spare is a VMM that was started ahead. Who takes it out of its pool owns it.
type spare struct {
	t    *spares
	pool *pool
	// id is that of the VM that it becomes: its files are named by it.
	id     string
	begun  context.Context
	cancel context.CancelCauseFunc
	// started is closed when the start is over; got or err is there then.
	started chan struct{}
	got     restored
	err     error
	// taken is closed when it has left its pool.
	taken chan struct{}
}

func (t *spares) init(s *Supervisor, most int) {
	t.s, t.max = s, most
	t.byKind = map[kind]*pool{}
}

func (o *origin) kind() kind {
	k := kind{o.serverKey(), o.req.MemBackend, o.req.Merge, o.req.Jail}
	if k.backend != string(vmm.BackendUFFD) {
		k.Policy, k.NoReplay = "", false
	}
	return k
}

// join counts a clone, until leave.
func (t *spares) join(k kind) *pool {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.byKind[k]
	if p == nil {
		p = &pool{kind: k}
		t.byKind[k] = p
	}
	p.clones++
	return p
}

// leave ends the spares with the last clone. When it returns, they are gone.
func (t *spares) leave(p *pool) {
	t.mu.Lock()
	var left []*spare
	if p.clones--; p.clones == 0 {
		delete(t.byKind, p.kind)
		left = p.drain()
	}
	t.mu.Unlock()
	t.end(left...)
}

// take returns a spare, or nil. It may still be starting.
func (t *spares) take(k kind) *spare {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.byKind[k]
	if p == nil || len(p.spares) == 0 {
		return nil
	}
	sp := p.spares[0]
	p.remove(sp)
	return sp
}

// remove takes one out of its pool, and says whether it was there. The caller
// holds spares.mu.
func (p *pool) remove(sp *spare) bool {
	i := slices.Index(p.spares, sp)
	if i < 0 {
		return false
	}
	p.spares = slices.Delete(p.spares, i, i+1)
	close(sp.taken)
	return true
}

// drain takes all out of the pool. The caller holds spares.mu.
func (p *pool) drain() []*spare {
	all := slices.Clone(p.spares)
	for _, sp := range all {
		p.remove(sp)
	}
	return all
}

// refill starts a spare in the background where one is missing. Further ones follow
// one by one: they are in nobody's way.
func (t *spares) refill(o *origin) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.byKind[o.kind()]
	if t.closed || p == nil || p.failed || len(p.spares) >= t.max {
		return
	}
	own, err := o.again()
	if err != nil {
		t.s.log.Warn("no VMM is started ahead", "snapshot", o.snap.Name, "error", err)
		return
	}
	sp := &spare{t: t, pool: p, id: randomHex(6), started: make(chan struct{}), taken: make(chan struct{})}
	sp.begun, sp.cancel = context.WithCancelCause(t.s.life)
	p.spares = append(p.spares, sp)
	t.s.spawn(func() {
		defer own.close()
		sp.start(own)
	})
}

// start starts the VMM, and then watches it until somebody takes it.
func (sp *spare) start(o *origin) {
	s := sp.t.s
	sp.got, sp.err = sp.restore(o)
	close(sp.started)
	if sp.err == nil {
		s.log.Info("VMM started ahead", "id", sp.id, "pid", sp.got.vm.Handle().PID, "snapshot", o.snap.Name)
		sp.t.refill(o)
		select {
		case <-sp.taken:
			return
		case <-sp.got.vm.Done():
		}
	}
	sp.t.mu.Lock()
	ours := sp.pool.remove(sp)
	sp.pool.failed = sp.pool.failed || sp.err != nil && sp.begun.Err() == nil
	sp.t.mu.Unlock()
	if !ours {
		return
	}
	if sp.err != nil {
		s.log.Warn("starting a VMM ahead failed; clones are slower for it", "snapshot", o.snap.Name, "error", sp.err)
	} else {
		s.log.Warn("a VMM that was started ahead ended", "id", sp.id, "snapshot", o.snap.Name, "said", sp.got.vm.Tail())
	}
	sp.end()
}

func (sp *spare) restore(o *origin) (restored, error) {
	s := sp.t.s
	place := vmm.Place{ID: sp.id, Dir: s.o.Layout.VM(sp.id), Runtime: s.o.Layout.VMRuntime(sp.id)}
	for _, d := range []string{place.Dir, place.Runtime} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return restored{}, fmt.Errorf("make VM's directory: %w", err)
		}
	}
	r, err := s.restore(sp.begun, o, sp, vmm.RestoreConfig{Place: place, Paused: true})
	if err != nil {
		return restored{}, because(sp.begun, err)
	}
	r.record(sp.begun, false)
	return r, nil
}

// serverEnded implements [user].
func (sp *spare) serverEnded(reason string) {
	sp.cancel(errors.New(reason))
	<-sp.started
	if sp.err == nil {
		_ = sp.got.vm.Kill()
	}
}

// serverReplaced implements [user]. A spare has no record.
func (*spare) serverReplaced(*server) {}

// end leaves nothing of a spare that was taken out of its pool.
func (sp *spare) end() {
	s := sp.t.s
	sp.cancel(nil)
	<-sp.started
	if sp.err == nil {
		end(sp.got.vm)
		s.servers.drop(sp.got.server, sp)
	}
	dir := s.o.Layout.VM(sp.id)
	if err := errors.Join(os.RemoveAll(s.o.Layout.VMRuntime(sp.id)), jail.Remove(dir), os.RemoveAll(dir)); err != nil {
		s.log.Warn("removing the files of a VMM that was started ahead failed", "id", sp.id, "error", err)
	}
}

func (t *spares) end(all ...*spare) {
	var wg sync.WaitGroup
	for _, sp := range all {
		wg.Go(sp.end)
	}
	wg.Wait()
}

// close ends all spares, for good.
func (t *spares) close() {
	t.mu.Lock()
	t.closed = true
	var all []*spare
	for _, p := range t.byKind {
		all = append(all, p.drain()...)
	}
	t.mu.Unlock()
	t.end(all...)
}

// list returns the spares that wait for a clone.
func (t *spares) list() []*spare {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*spare
	for _, p := range t.byKind {
		for _, sp := range p.spares {
			select {
			case <-sp.started:
				if sp.err == nil {
					all = append(all, sp)
				}
			default:
			}
		}
	}
	return all
}

// served is how many of them have their memory from p.
func (t *spares) served(p *server) int {
	n := 0
	for _, sp := range t.list() {
		if sp.got.server == p {
			n++
		}
	}
	return n
}

// useSpare makes the spare that m was given its VMM, and lets the guest run. It
// returns nil where there is none, or none that is of any use.
func (m *machine) useSpare(ctx context.Context, ports []vmm.Port) (vmm.VM, error) {
	sp := m.spare
	if sp == nil {
		return nil, nil //nolint:nilnil // as documented
	}
	// One that still starts is ahead of any that would be started now.
	select {
	case <-sp.started:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	m.spare = nil // from here on it is m, or nothing
	sp.cancel(nil)
	if sp.err != nil {
		return nil, nil //nolint:nilerr,nilnil // it is in the log, and a new one may start
	}
	vm := sp.got.vm
	m.s.servers.pass(sp.got.server, sp, m)
	if err := m.restored(sp.got); err != nil {
		return nil, err
	}
	err := vmm.ErrGone
	select {
	case <-vm.Done(): // a moment ago, or it would not have been there to take
	default:
		if err = vm.Publish(ctx, ports); err == nil {
			sp.got.record(ctx, true)
			err = vm.Resume(ctx)
		}
	}
	if !errors.Is(err, vmm.ErrGone) {
		return vm, err
	}
	m.s.log.Warn("a VMM that was started ahead ended", "vm", m.name, "error", err, "said", vm.Tail())
	<-vm.Done()
	m.letServerGo()
	return nil, m.update(func(r *record) {
		m.vm = nil
		r.Handle, r.PageServer, r.VM.PID, r.VM.Warnings = nil, nil, 0, nil
	})
}
