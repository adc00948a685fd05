package supervisor

import (
	"context"
	"fmt"
	"os"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/procmem"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
)

// stateReserve is room for the device state, some 20 KiB, and the manifest.
const stateReserve = 1 << 20

// Snapshot implements [api.Backend].
func (s *Supervisor) Snapshot(ctx context.Context, req api.SnapshotRequest) (api.SnapshotResult, error) {
	begun := time.Now()
	if err := snapshot.CheckName(req.Name); err != nil {
		return api.SnapshotResult{}, explain(err)
	}
	m, err := s.find(req.VM)
	if err != nil {
		return api.SnapshotResult{}, err
	}
	// One at a time: two would fight over who lets the VM go on.
	if err := lock(ctx, m.op); err != nil {
		return api.SnapshotResult{}, explain(err)
	}
	defer unlock(m.op)
	res := api.SnapshotResult{Version: api.SchemaVersion, Name: req.Name}
	snap, err := s.snapshots.Create(ctx, req.Name, func(ctx context.Context, d *snapshot.Draft) (snapshot.Manifest, error) {
		return m.draw(ctx, d, &res)
	})
	if err != nil {
		return api.SnapshotResult{}, explain(err)
	}
	res.DiskBytes = snap.DiskBytes()
	res.TotalMillis = millis(time.Since(begun))
	s.log.Info("snapshot made", "vm", m.name, "snapshot", req.Name, "pause_ms", res.PauseMillis, "total_ms", res.TotalMillis,
		"private_bytes", res.PrivateBytes, "disk_bytes", res.DiskBytes)
	return res, nil
}

// settleTime is how long a guest that was asked to be quiet gets to be so.
const settleTime = 50 * time.Millisecond

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// draw writes memory and state of the VM into a draft. Whatever happens, the VM
// is afterwards in the state that it was in. The caller holds m.op.
func (m *machine) draw(ctx context.Context, d *snapshot.Draft, res *api.SnapshotResult) (snapshot.Manifest, error) {
	vm, state, err := m.running()
	if err != nil {
		return snapshot.Manifest{}, err
	}
	ctx, stop := untilDone(ctx, vm)
	defer stop()
	m.mu.Lock()
	rec := m.rec
	m.mu.Unlock()
	regions := vm.Handle().Regions
	proc, err := procmem.Open(vm.Handle().PID)
	if err != nil {
		return snapshot.Manifest{}, err
	}
	defer func() { _ = proc.Close() }()
	mem, err := m.base(ctx, d, rec, proc, regions)
	if err != nil {
		return snapshot.Manifest{}, because(ctx, err)
	}
	if state == api.StatePaused {
		err = m.take(ctx, d, vm, proc, regions, mem, res)
	} else {
		err = m.takePaused(ctx, d, vm, proc, regions, mem, res)
	}
	if err != nil {
		return snapshot.Manifest{}, because(ctx, err)
	}
	return manifest(rec, regions), nil
}

// base makes the memory file with all that can be written while the VM runs: the
// parent's memory, and the pages as they are just now. Most of them will still be
// the same in the pause.
func (m *machine) base(ctx context.Context, d *snapshot.Draft, rec record, proc *procmem.Process, regions []vmm.Region) (*os.File, error) {
	var need int64
	for _, r := range regions {
		n, err := proc.PrivateBytes(r.Addr, r.Size)
		if err != nil {
			return nil, err
		}
		need += n
	}
	var parent *snapshot.Snapshot
	if rec.VM.Snapshot != "" {
		// The VM's lease keeps it.
		p, err := m.s.snapshots.Get(rec.VM.Snapshot)
		if err != nil {
			return nil, fmt.Errorf("open parent snapshot: %w", err)
		}
		parent = p
	}
	if err := d.Reserve(need + stateReserve); err != nil {
		return nil, err
	}
	mem, err := d.CreateMemory(ctx, rec.Machine.MemoryBytes, parent)
	if err != nil {
		return nil, err
	}
	if rec.VM.State != api.StatePaused {
		if _, err := proc.Dump(ctx, regions, mem, procmem.Options{Base: parent != nil}); err != nil {
			return nil, err
		}
	}
	return mem, nil
}

// takePaused brings the agent's link to rest, pauses the VM for as long as it
// takes, and lets it go on.
func (m *machine) takePaused(ctx context.Context, d *snapshot.Draft, vm vmm.VM, proc *procmem.Process, regions []vmm.Region, mem *os.File, res *api.SnapshotResult) error {
	if err := m.quiesce(ctx); err != nil {
		return err
	}
	// What the guest did just now has an aftermath in its kernel (RCU, work queues)
	// that each clone would run through before it hears its host.
	select {
	case <-time.After(settleTime):
	case <-ctx.Done():
		m.unquiesce()
		return context.Cause(ctx)
	}
	paused := time.Now()
	err := vm.Pause(ctx)
	if err == nil {
		err = m.take(ctx, d, vm, proc, regions, mem, res)
	}
	// Also when the pause failed, or ctx ended: half of it may have happened.
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), agentTimeout)
	defer cancel()
	if rerr := vm.Resume(rctx); rerr != nil && err == nil {
		err = fmt.Errorf("resume VM %s: %w", m.name, rerr)
	}
	res.PauseMillis = millis(time.Since(paused))
	m.unquiesce()
	m.s.spawn(m.catchUp)
	return err
}

// take writes the device state and the private pages of a paused VM.
func (m *machine) take(ctx context.Context, d *snapshot.Draft, vm vmm.VM, proc *procmem.Process, regions []vmm.Region, mem *os.File, res *api.SnapshotResult) error {
	if err := vm.SaveState(ctx, d.StatePath()); err != nil {
		return fmt.Errorf("save device state of VM %s: %w", m.name, err)
	}
	dumped, err := proc.Dump(ctx, regions, mem, procmem.Options{Base: true, Compare: true})
	if err != nil {
		return err
	}
	res.PrivateBytes = dumped.Private
	return nil
}

func manifest(rec record, regions []vmm.Region) snapshot.Manifest {
	man := snapshot.Manifest{
		VM: rec.VM.Name, Parent: rec.VM.Snapshot,
		Image:     snapshot.Image{Ref: rec.VM.Image, ID: rec.VM.ImageDigest},
		Engine:    snapshot.Engine{Name: rec.VM.Engine, Version: rec.VM.EngineVersion, Accel: rec.VM.Accel, CPU: rec.VM.CPU},
		Machine:   snapshot.Machine{MemoryBytes: rec.Machine.MemoryBytes, CPUs: rec.Machine.CPUs, HugePages: rec.Machine.HugePages, Network: rec.Machine.Network},
		Guest:     rec.Guest,
		Container: rec.Container,
	}
	for _, r := range regions {
		man.Regions = append(man.Regions, snapshot.MemRegion{Offset: r.Offset, Size: r.Size})
	}
	return man
}
