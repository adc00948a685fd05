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
		st.PageServers = append(st.PageServers, describeServer(p.key, ps))
	}
	var held []memstat.VM
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
		template := ""
		if p := m.server; p != nil {
			template = p.key.template()
		} else if vm.Snapshot != "" {
			template = "file " + vm.Snapshot
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
		held = append(held, memstat.VM{Usage: *u, Template: template, MemoryBytes: vm.MemoryBytes})
	}
	t := memstat.Total(held, templates)
	st.Total = api.TotalStats{
		UnsharedBytes: t.Unshared, HeldBytes: t.Held, SavedPercent: t.SavedPercent(),
		OverheadBytes: t.Overhead + overhead, MemoryBytes: t.Memory,
	}
	return st, nil
}

// template names a template for memstat.
func (k serverKey) template() string { return k.Policy + " " + k.Snapshot + " " + k.Sum }

// usage measures a VM; nil when it does not run.
func (m *machine) usage() (*memstat.Usage, error) {
	vm, _, err := m.running()
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // one that does not run holds nothing
	}
	h := vm.Handle()
	u, err := memstat.Process(h.PID, h.Regions)
	switch {
	case err == nil:
		return &u, nil
	case errors.Is(err, vmm.ErrGone), errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return nil, nil //nolint:nilnil // it ended meanwhile
	}
	return nil, fmt.Errorf("measure VM %s: %w", m.name, err)
}

// hint says where another choice would hold less.
func hint(vm api.VM, u *memstat.Usage) string {
	switch {
	case vm.Policy == policyCopy && u.Anon > u.RSS/2:
		return "copied pages are private; --policy share shares them between clones"
	case vm.Snapshot != "" && vm.MemBackend == string(vmm.BackendFile) && len(vm.Warnings) > 0:
		return "falls back to the memory file; `fcvm doctor` tells what userfaultfd lacks here"
	}
	return ""
}
