package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/memstat"
	"fcvm/internal/vmm"
)

// serverStatsTimeout bounds a page server's answer about itself.
const serverStatsTimeout = 5 * time.Second

// Stats implements [api.Backend].
func (s *Supervisor) Stats(ctx context.Context, name string) (api.Stats, error) {
	ms := s.machines()
	if name != "" {
		m, err := s.find(name)
		if err != nil {
			return api.Stats{}, err
		}
		ms = []*machine{m}
	}
	st := api.Stats{Version: api.SchemaVersion, VMs: []api.VMStats{}, PageServers: []api.PageServerStats{}}
	templates := map[string]int64{}
	sessions := map[int]*api.Serving{}
	var overhead int64
	for _, p := range s.servers.list() {
		ctx, cancel := context.WithTimeout(ctx, serverStatsTimeout)
		ps, err := p.proc.Stats(ctx)
		cancel()
		if err != nil {
			s.log.Warn("page server does not answer", "snapshot", p.key.Snapshot, "error", err)
			continue
		}
		templates[p.key.template()] = ps.TemplateBytes
		overhead += ps.RSSBytes
		for _, se := range ps.Sessions {
			sessions[se.PID] = describeSession(se)
		}
		one := describeServer(p.key, ps)
		one.Sessions -= s.spares.served(p)
		st.PageServers = append(st.PageServers, one)
	}
	held, err := s.spareUsage()
	if err != nil {
		return st, explain(err)
	}
	for _, v := range held {
		st.Total.Spares++
		st.Total.SpareBytes += v.PSS + v.OverheadPSS
	}
	usages := make([]*memstat.Usage, len(ms))
	var g errgroup.Group
	g.SetLimit(4)
	for i, m := range ms {
		g.Go(func() error {
			u, err := m.usage()
			usages[i] = u
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return st, explain(err)
	}
	for i, m := range ms {
		u := usages[i]
		if u == nil {
			continue
		}
		m.mu.Lock()
		vm := m.rec.VM
		backing := ""
		if vm.Snapshot != "" {
			backing = template(m.server, vm.Snapshot)
		}
		m.mu.Unlock()
		row := api.VMStats{
			Name: vm.Name, ID: vm.ID, RSSBytes: u.RSS, PSSBytes: u.PSS, PrivateBytes: u.Private, SharedBytes: u.Shared,
			AnonBytes: u.Anon, OverheadBytes: u.OverheadPSS, MemoryBytes: vm.MemoryBytes,
			Snapshot: vm.Snapshot, Policy: vm.Policy, Serving: sessions[vm.PID], Hint: hint(vm, u),
		}
		if row.Serving != nil {
			row.Faults = row.Serving.Faults
		}
		st.VMs = append(st.VMs, row)
		held = append(held, memstat.VM{Usage: *u, Template: backing, MemoryBytes: vm.MemoryBytes})
	}
	t := memstat.Total(held, templates)
	st.Total.UnsharedBytes, st.Total.HeldBytes, st.Total.SavedPercent = t.Unshared, t.Held, t.SavedPercent()
	st.Total.OverheadBytes, st.Total.MemoryBytes = t.Overhead+overhead, t.Memory
	return st, nil
}

// spareUsage measures the VMMs that wait for a clone.
func (s *Supervisor) spareUsage() ([]memstat.VM, error) {
	var held []memstat.VM
	for _, sp := range s.spares.list() {
		u, err := usage(sp.got.vm)
		if err != nil {
			return nil, fmt.Errorf("measure VMM %s: %w", sp.id, err)
		}
		if u != nil {
			held = append(held, memstat.VM{Usage: *u, Template: template(sp.got.server, sp.pool.kind.Snapshot), Spare: true})
		}
	}
	return held, nil
}

// template names for memstat what backs a clone's memory: the template of its page
// server, or the snapshot's memory file.
func template(p *server, snapshot string) string {
	if p == nil {
		return "file " + snapshot
	}
	return p.key.template()
}

// template names a template for memstat.
func (k serverKey) template() string { return fmt.Sprint(k) }

// usage measures a VM; nil when it does not run.
func (m *machine) usage() (*memstat.Usage, error) {
	vm, _, err := m.running()
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // one that does not run holds nothing
	}
	u, err := usage(vm)
	if err != nil {
		return nil, fmt.Errorf("measure VM %s: %w", m.name, err)
	}
	return u, nil
}

// usage is nil when the VM has ended.
func usage(vm vmm.VM) (*memstat.Usage, error) {
	h := vm.Handle()
	u, err := memstat.Process(h.PID, h.Regions)
	switch {
	case err == nil:
		return &u, nil
	case errors.Is(err, vmm.ErrGone), errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return nil, nil //nolint:nilnil // it ended meanwhile
	}
	return nil, err
}

// hint says where another choice would hold less.
func hint(vm api.VM, u *memstat.Usage) string {
	switch {
	case vm.Policy == policyCopy && !vm.HugePages && u.Anon > u.RSS/2:
		return "copied pages are private; --policy share shares them between clones"
	case vm.Snapshot != "" && vm.MemBackend == string(vmm.BackendFile) && len(vm.Warnings) > 0:
		return "falls back to the memory file; `fcvm doctor` tells what userfaultfd lacks here"
	}
	return ""
}
