package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"fcvm/internal/vmm"
)

// restored is a VMM that was started from a snapshot, and how.
type restored struct {
	vm vmm.VM
	// server serves its memory, or is nil.
	server *server
	// warning says why there is none though one was asked for.
	warning string
}

// recordTimeout bounds what a page server is told for speed only.
const recordTimeout = time.Second

// record says that the guest begins to run, or waits.
func (r *restored) record(ctx context.Context, on bool) {
	if r.server == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	// One that is just being replaced loses a part of a working set.
	_ = r.server.proc.Record(ctx, r.vm.Handle().PID, on)
}

// restore starts a VMM with the memory that was asked for, or from the file where
// userfaultfd cannot be attached. u is who uses the page server.
func (s *Supervisor) restore(ctx context.Context, o *origin, u user, cfg vmm.RestoreConfig) (restored, error) {
	cfg.Inherit, cfg.Jail = []*os.File{o.lease, o.image}, o.req.Jail
	cfg.Machine = o.machine()
	cfg.State = o.snap.State()
	var r restored
	if o.req.MemBackend == string(vmm.BackendUFFD) {
		served, err := s.restoreServed(ctx, o, u, cfg)
		if err == nil || !errors.Is(err, vmm.ErrAttach) {
			return served, err
		}
		r.warning = fmt.Sprintf("no userfaultfd (%v): memory comes from the file, as with --mem-backend file", err)
	}
	f, err := os.Open(o.snap.Memory())
	if err != nil {
		return restored{}, fmt.Errorf("open memory of snapshot %s: %w", o.snap.Name, err)
	}
	defer f.Close()
	cfg.Memory = vmm.Memory{Backend: vmm.BackendFile, File: f}
	if r.vm, err = o.eng.Restore(ctx, cfg); err != nil {
		return restored{}, err
	}
	return r, nil
}

func (s *Supervisor) restoreServed(ctx context.Context, o *origin, u user, cfg vmm.RestoreConfig) (_ restored, err error) {
	p, err := s.servers.get(ctx, u, o.serverKey(), o.snap, o.lease)
	if err != nil {
		return restored{}, err
	}
	defer func() {
		if err != nil {
			s.servers.drop(p, u)
		}
	}()
	template, err := p.proc.Template()
	if err != nil {
		return restored{}, fmt.Errorf("open template of snapshot %s: %w", o.snap.Name, err)
	}
	defer template.Close()
	cfg.Memory = vmm.Memory{Backend: vmm.BackendUFFD, File: template, Socket: p.proc.Socket(), Copied: o.req.Policy == policyCopy, Merge: o.req.Merge}
	vm, err := o.eng.Restore(ctx, cfg)
	if err != nil {
		return restored{}, err
	}
	return restored{vm: vm, server: p}, nil
}

// restore gives the clone a VMM that runs: the one that was started ahead, if
// there is one, else a new one.
func (m *machine) restore(ctx context.Context, o *origin, ports []vmm.Port) (vmm.VM, error) {
	vm, err := m.useSpare(ctx, ports)
	if vm != nil || err != nil {
		return vm, err
	}
	r, err := m.s.restore(ctx, o, m, vmm.RestoreConfig{
		Place: vmm.Place{ID: m.id, Dir: m.dir(), Runtime: m.runtime()},
		Ports: ports,
	})
	if err != nil {
		return nil, err
	}
	return r.vm, m.restored(r)
}

// restored puts the VMM that the clone now has on record. Also with an error it is
// the clone's, and ends with it.
func (m *machine) restored(r restored) error {
	if r.warning != "" {
		m.s.log.Warn("fallback", "vm", m.name, "warning", r.warning)
	}
	m.mu.Lock()
	m.vm, m.server = r.vm, r.server
	m.mu.Unlock()
	h := r.vm.Handle()
	return m.update(func(rec *record) {
		rec.Handle, rec.VM.PID = &h, h.PID
		rec.VM.MemBackend, rec.VM.Policy, rec.VM.NoReplay = string(vmm.BackendFile), "", false
		if p := r.server; p != nil {
			rec.VM.MemBackend, rec.VM.Policy, rec.VM.NoReplay = string(vmm.BackendUFFD), p.key.Policy, p.key.NoReplay
			rec.PageServer = m.s.servers.record(p)
		}
		if r.warning != "" {
			rec.VM.Warnings = append(rec.VM.Warnings, r.warning)
		}
	})
}
