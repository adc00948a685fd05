package supervisor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/proto"
	"fcvm/internal/image"
	"fcvm/internal/network"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/merge"
)

const (
	policyShare = "share"
	policyCopy  = "copy"
	// entropyBytes is what a clone's random number generator gets: twice the
	// 128 bytes of Linux's input pool hash state and key, to be safe.
	entropyBytes = 256
)

// origin is what all clones of one request have in common.
type origin struct {
	snap  *snapshot.Snapshot
	img   *image.Image
	eng   vmm.Engine
	info  vmm.Info
	lease *os.File // of the snapshot
	image *os.File // lease of the image
	req   *api.CloneRequest
}

func (o *origin) close() {
	if o.lease != nil {
		_ = o.lease.Close()
	}
	if o.image != nil {
		_ = o.image.Close()
	}
}

// machine is what the clones are.
func (o *origin) machine() vmm.Machine {
	m := o.snap.Machine
	return vmm.Machine{MemoryBytes: m.MemoryBytes, CPUs: m.CPUs, HugePages: m.HugePages, RootFS: o.img.RootFS, Network: m.Network}
}

// again returns an origin of the same snapshot with leases of its own.
func (o *origin) again() (*origin, error) {
	other := *o
	other.lease, other.image = nil, nil
	var err error
	if other.lease, err = dup(o.lease); err == nil {
		other.image, err = dup(o.image)
	}
	if err != nil {
		other.close()
		return nil, fmt.Errorf("duplicate lease: %w", err)
	}
	return &other, nil
}

func dup(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	n := -1
	var dupErr error
	err = raw.Control(func(fd uintptr) { n, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dupErr); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(n), f.Name()), nil
}

// Clone implements [api.Backend].
func (s *Supervisor) Clone(ctx context.Context, req api.CloneRequest, ready func(api.VM)) error {
	begun := time.Now()
	if err := checkClone(&req); err != nil {
		return err
	}
	o, err := s.origin(ctx, &req)
	if err != nil {
		return explain(err)
	}
	defer o.close()

	// Names first, all of them: a taken one is told before anything starts.
	ms, err := s.addClones(o, begun)
	if err != nil {
		return explain(err)
	}
	defer s.spares.refill(o)
	var mu sync.Mutex // ready is not called concurrently
	g, gctx := errgroup.WithContext(ctx)
	// More at once than there are processors only makes each of them later.
	g.SetLimit(max(2, runtime.NumCPU()))
	made := make([]bool, len(ms))
	for i, m := range ms {
		g.Go(func() error {
			start := time.Now()
			if i == 0 {
				start = begun
			}
			if err := gctx.Err(); err != nil {
				return context.Cause(gctx)
			}
			if err := m.clone(gctx, o, i, start); err != nil {
				return m.calledOff(err)
			}
			mu.Lock()
			defer mu.Unlock()
			made[i] = true
			ready(m.view())
			return nil
		})
	}
	err = g.Wait()
	if err == nil {
		return nil
	}
	// All or nothing. The clones that are ready are ended like the others.
	for i, m := range ms {
		if !made[i] {
			m.abandon()
			continue
		}
		if kerr := m.kill(""); kerr == nil || !m.live() {
			<-m.exited
			kerr = m.erase()
			if kerr == nil {
				continue
			}
		}
		s.log.Error("removing a clone failed", "vm", m.name)
	}
	return explain(err)
}

func checkClone(req *api.CloneRequest) error {
	if err := snapshot.CheckName(req.Snapshot); err != nil {
		return explain(err)
	}
	if req.Count == 0 {
		req.Count = 1
	}
	if req.Count < 1 || req.Count > maxVMs {
		return invalid("%d clones: 1 to %d can be made at once", req.Count, maxVMs)
	}
	switch vmm.Backend(req.MemBackend) {
	case "":
		req.MemBackend = string(vmm.BackendUFFD)
	case vmm.BackendUFFD, vmm.BackendFile:
	default:
		return invalid("memory backend %q is neither uffd nor file", req.MemBackend)
	}
	switch req.Policy {
	case "", policyShare, policyCopy:
	default:
		return invalid("policy %q is neither share nor copy", req.Policy)
	}
	if req.Merge {
		if req.Policy != policyCopy || req.MemBackend != string(vmm.BackendUFFD) {
			return invalid("pages can be merged with policy copy only: with the others, clones share them from the start")
		}
		if err := merge.Runs(); err != nil {
			return &api.Error{Code: api.CodeUnavailable, Message: err.Error()}
		}
	}
	if req.Name != "" {
		last := req.Name
		if req.Count > 1 {
			last = fmt.Sprintf("%s-%d", req.Name, req.Count)
		}
		if err := checkName(last); err != nil {
			return err
		}
	}
	for _, n := range []int{0, req.Count - 1} {
		if _, err := network.Shift(req.Ports, n); err != nil {
			return invalid("publish ports: %v", err)
		}
	}
	return checkEnv(req.Env)
}

// origin checks all that a clone needs, before anything is started.
func (s *Supervisor) origin(ctx context.Context, req *api.CloneRequest) (*origin, error) {
	o := &origin{req: req}
	ok := false
	defer func() {
		if !ok {
			o.close()
		}
	}()
	var err error
	// The lease first, so that what is checked is what is used.
	if o.lease, err = s.snapshots.Lease(req.Snapshot); err != nil {
		return nil, err
	}
	if o.snap, err = s.snapshots.Get(req.Snapshot); err != nil {
		return nil, err
	}
	if err = s.snapshots.Check(ctx, o.snap, nil); err != nil {
		return nil, fmt.Errorf("use snapshot %s: %w", req.Snapshot, err)
	}
	if o.snap.Machine.Network == vmm.NetworkNone && len(req.Ports) > 0 {
		return nil, invalid("publish ports: the VM of snapshot %s had no network, and so has none of its clones", req.Snapshot)
	}
	if err = choosePolicy(req, o.snap.Machine.HugePages); err != nil {
		return nil, err
	}
	want := o.snap.Engine
	if o.eng, err = s.engine(want.Name); err != nil {
		return nil, err
	}
	if o.info, err = o.eng.Info(ctx); err != nil {
		return nil, err
	}
	if err = checkEngine(req.Snapshot, want, o.info); err != nil {
		return nil, err
	}
	if o.img, err = s.o.Images.Get(o.snap.Image.ID); err != nil {
		if errors.Is(err, image.ErrUnknown) {
			return nil, &api.Error{
				Code:    api.CodeNotFound,
				Message: fmt.Sprintf("snapshot %s needs the image %s (%s), which was removed", req.Snapshot, o.snap.Image.Ref, o.snap.Image.ID),
				Hint:    fmt.Sprintf("`fcvm image pull` it again, as %s", o.snap.Image.Ref),
			}
		}
		return nil, err
	}
	if o.image, err = s.o.Images.Lease(o.img.ID); err != nil {
		return nil, err
	}
	ok = true
	return o, nil
}

// choosePolicy fills in the policy where there is none. Huge pages can only be copied:
// Firecracker maps no file for them.
func choosePolicy(req *api.CloneRequest, huge bool) error {
	switch {
	case !huge && req.Policy == "":
		req.Policy = policyShare
	case huge && (req.Policy == policyShare || req.MemBackend != string(vmm.BackendUFFD)):
		return invalid("the memory of snapshot %s is of huge pages, which clones cannot share: use --policy copy", req.Snapshot)
	case huge && req.Merge:
		return invalid("the memory of snapshot %s is of huge pages, which the kernel does not merge", req.Snapshot)
	case huge:
		req.Policy = policyCopy
	}
	return nil
}

// checkEngine refuses a snapshot that this host's engine did not write: what a
// device state means is known to its own version alone.
func checkEngine(name string, want snapshot.Engine, have vmm.Info) error {
	for _, f := range []struct{ what, want, have string }{
		{"version", want.Version, have.Version},
		{"accelerator", want.Accel, have.Accel},
		{"CPU model", want.CPU, have.CPU},
	} {
		if f.want != f.have {
			return &api.Error{
				Code: api.CodeUnavailable,
				Message: fmt.Sprintf("snapshot %s was made by %s with %s %s, and here it is %s",
					name, want.Name, f.what, f.want, f.have),
				Hint: fmt.Sprintf("use %s with %s %s, or make the snapshot anew", want.Name, f.what, f.want),
			}
		}
	}
	return nil
}

func (s *Supervisor) addClones(o *origin, begun time.Time) ([]*machine, error) {
	var ms []*machine
	k := o.kind()
	for i := range o.req.Count {
		name := o.req.Name
		if name != "" && o.req.Count > 1 {
			name = fmt.Sprintf("%s-%d", name, i+1)
		}
		m, err := s.add(name, cloneRecord(o, begun), func() *spare { return s.spares.take(k) })
		if err != nil {
			for _, m := range ms {
				m.abandon()
			}
			return nil, err
		}
		m.kin = s.spares.join(k)
		m.mu.Lock()
		m.rec.VM.Hostname, m.rec.Container.Hostname = m.name, m.name
		m.mu.Unlock()
		ms = append(ms, m)
	}
	return ms, nil
}

func cloneRecord(o *origin, begun time.Time) record {
	c := o.snap.Container
	c.Ports = nil
	return record{
		VM: api.VM{
			Image: o.snap.Image.Ref, ImageDigest: o.snap.Image.ID, Network: o.snap.Machine.Network, Snapshot: o.snap.Name,
			Engine: o.info.Name, EngineVersion: o.info.Version, Accel: o.info.Accel, CPU: o.info.CPU,
			CPUs: o.snap.Machine.CPUs, MemoryBytes: o.snap.Machine.MemoryBytes, HugePages: o.snap.Machine.HugePages, MemBackend: o.req.MemBackend, Merge: o.req.Merge,
			Command: c.Command, Env: c.Env, TTY: c.TTY, OpenStdin: c.OpenStdin, AutoRemove: o.req.AutoRemove, Created: begun,
			Jailed: o.req.Jail,
		},
		Machine:   o.machine(),
		Guest:     o.snap.Guest,
		Container: c,
		ClientEnv: o.req.Env,
	}
}

// clone starts the i-th clone of a request, and returns when its agent has
// confirmed the new identity.
func (m *machine) clone(ctx context.Context, o *origin, i int, begun time.Time) error {
	ctx, stop := m.creation(ctx)
	defer stop()
	wanted, err := network.Shift(o.req.Ports, i)
	if err != nil {
		return err
	}
	ports, err := m.s.claims.Claim(ctx, m.name, wanted)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.rec.VM.Ports, m.rec.Container.Ports = ports, ports
	m.mu.Unlock()
	ahead := m.spare != nil
	if err := m.prepare(); err != nil {
		return err
	}
	prepared := time.Now()
	vm, err := m.restore(ctx, o, ports)
	if err != nil {
		return because(ctx, err)
	}
	restored := time.Now()
	// The next one starts while this one's guest is given its identity: of 100 clones
	// that were asked for one after another, each was ready in two thirds of the time
	// that it took when the next one started only then. Of several at once, each has
	// to start anyway.
	if o.req.Count == 1 {
		m.s.spares.refill(o)
	}
	if err := m.identify(ctx, vm); err != nil {
		return m.cloneFailed(vm, err)
	}
	return m.ready(begun, "ahead", ahead, "prepare_ms", millis(prepared.Sub(begun)), "restore_ms", millis(restored.Sub(prepared)),
		"identify_ms", millis(time.Since(restored)))
}

const (
	// clockWithin is how far a guest's clock may be behind the host's, after it was set.
	clockWithin = 50 * time.Millisecond
	// clockTries bounds how often a clock is set once more, on a machine that is slow. In
	// the KVM lab the first message took up to 1.9 s, with two clones that started.
	clockTries = 10
)

// identify makes a clone itself. Its agent is not greeted before the first request.
func (m *machine) identify(ctx context.Context, vm vmm.VM) error {
	if err := lock(ctx, m.connecting); err != nil {
		return err
	}
	defer unlock(m.connecting)
	ctx, cancel := context.WithTimeoutCause(ctx, agentTimeout, errNoAnswer{agentTimeout})
	defer cancel()
	ctx, stop := untilDone(ctx, vm)
	defer stop()
	entropy := make([]byte, entropyBytes)
	_, _ = rand.Read(entropy) // never fails (crypto/rand)
	id := proto.Identity{Hostname: m.name, MachineID: randomHex(16), Entropy: entropy}
	var c *agent.Client
	err := onceMore(func() (err error) {
		c, err = m.introduce(ctx, vm, id)
		return err
	})
	if err != nil {
		return because(ctx, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vm != vm { // it ended, or we let go of it
		_ = c.Close()
		return wrongState("VM %s is not running", m.name)
	}
	m.agent = c
	return nil
}

// onceMore tries what goes over a connection to the agent, and again where that ended. A pause
// of Firecracker may end the one that there was; and a guest that learns only after its
// start that its VMM is another one ends one that came just before (Firecracker before 1.16).
func onceMore(try func() error) error {
	err := try()
	if errors.Is(err, agent.ErrClosed) {
		err = try()
	}
	return err
}

// introduce tells the guest over a new connection who it is, and what time it is.
func (m *machine) introduce(ctx context.Context, vm vmm.VM, id proto.Identity) (*agent.Client, error) {
	conn, err := vm.DialAgent(ctx)
	if err != nil {
		return nil, fmt.Errorf("reach the agent of VM %s: %w", m.name, err)
	}
	c := agent.New(conn)
	err = tellTime(func(now time.Time) error {
		id.Wall = now
		err := c.Identify(ctx, id)
		id = proto.Identity{}
		return err
	})
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("give clone %s its identity: %w", m.name, err)
	}
	return c, nil
}

// tellTime tells a guest the time, and once more when that took long: its clock is behind by
// the time that the message took, which is at most that until the answer. What comes
// second finds the guest warm.
func tellTime(tell func(now time.Time) error) error {
	for tries := 0; ; tries++ {
		now := time.Now()
		if err := tell(now); err != nil || time.Since(now) <= clockWithin || tries == clockTries {
			return err
		}
	}
}

// catchUp sets the guest's clock, which stood still while the VM was paused. A guest
// that cannot be told, because it is busy or ends, keeps the time it has.
func (m *machine) catchUp() {
	ctx, cancel := context.WithTimeout(m.s.life, agentTimeout)
	defer cancel()
	err := onceMore(func() error {
		c, err := m.client(ctx)
		if err != nil {
			return err
		}
		return tellTime(func(now time.Time) error { return c.SetClock(ctx, now) })
	})
	if err != nil {
		m.s.log.Info("a guest's clock is behind by the time that it was paused", "vm", m.name, "error", err)
	}
}

func (m *machine) cloneFailed(vm vmm.VM, err error) error {
	m.mu.Lock()
	p := m.server
	m.mu.Unlock()
	if p != nil {
		if f := p.failure(vm.Handle().PID); f != "" {
			return fmt.Errorf("clone %s: its memory could not be served: %s", m.name, f)
		}
	}
	msg := fmt.Sprintf("clone %s did not come up: %v", m.name, err)
	if tail := vm.Tail(); tail != "" {
		msg += ":\n" + tail
	}
	return &api.Error{Code: api.CodeInternal, Message: msg}
}
