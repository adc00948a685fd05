// Package metrics writes what a supervisor knows in Prometheus' text format. What
// it is given is one moment's; nothing is counted or kept here.
//
// Names begin with fcvm_. Those of fcvm_vm_ have the labels vm, snapshot and
// policy, those of fcvm_pageserver_ have snapshot, policy and replay; a label is empty
// where it means nothing, as snapshot for a VM that is no clone. Counters of a
// VM count since its start, those of a page server since the start of its
// process: they begin anew with a successor, as rate() expects.
package metrics

import (
	"strconv"

	"fcvm/internal/api"
)

// Text returns all metrics of a supervisor: its version, its VMs, and what they
// hold, in a document of type [ContentType].
func Text(version string, vms []api.VM, st api.Stats) []byte {
	return collect(version, vms, st).bytes()
}

// Family is a metric, as it is described to people.
type Family struct {
	Name, Type, Help string
	// Labels in their order.
	Labels []string
}

// Families returns all metrics that there may be.
func Families() []Family {
	// One of each, so that each has its labels.
	st := api.Stats{VMs: []api.VMStats{{Serving: &api.Serving{}}}, PageServers: []api.PageServerStats{{}}}
	var all []Family
	for _, f := range collect("", nil, st).families {
		all = append(all, Family{f.name, f.kind, f.help, f.labels})
	}
	return all
}

func collect(version string, vms []api.VM, st api.Stats) *text {
	t := &text{}
	t.family("fcvm_build_info", gauge, "The version of the supervisor, as a label of the value 1.").add(1, labels{"version", version})
	states(t, vms)
	total(t, st.Total)
	guests(t, st.VMs)
	servers(t, st.PageServers)
	return t
}

func states(t *text, vms []api.VM) {
	n := map[api.State]int{}
	for _, vm := range vms {
		n[vm.State]++
	}
	f := t.family("fcvm_vms", gauge, "VMs by state.")
	// All of them, also at 0: a series that comes and goes is hard to alert on.
	for _, s := range []api.State{api.StateCreating, api.StateRunning, api.StatePaused, api.StateExited} {
		f.add(float64(n[s]), labels{"state", string(s)})
	}
}

func total(t *text, s api.TotalStats) {
	for _, m := range []struct {
		name, help string
		value      int64
	}{
		{"fcvm_guest_memory_bytes", "Sizes of the guests that run, added up.", s.MemoryBytes},
		{"fcvm_unshared_bytes", "What all VMs would hold of guest memory if nothing were shared.", s.UnsharedBytes},
		{"fcvm_held_bytes", "What all VMs hold of guest memory, each template once.", s.HeldBytes},
		{"fcvm_overhead_bytes", "What VMMs and page servers hold apart from guest memory.", s.OverheadBytes},
		{"fcvm_spares", "VMMs that were started ahead and wait for a clone.", int64(s.Spares)},
		{"fcvm_spare_bytes", "What spares hold, which is part of fcvm_held_bytes and fcvm_overhead_bytes.", s.SpareBytes},
	} {
		t.family(m.name, gauge, m.help).add(float64(m.value), nil)
	}
}

// metric is one number of each element of a list.
type metric[T any] struct {
	name, kind, help string
	value            func(*T) float64
}

func guests(t *text, vms []api.VMStats) {
	of := func(vm *api.VMStats) labels {
		return labels{"vm", vm.Name, "snapshot", vm.Snapshot, "policy", vm.Policy}
	}
	for _, m := range []metric[api.VMStats]{
		{"memory_bytes", gauge, "Size of the guest.", func(v *api.VMStats) float64 { return float64(v.MemoryBytes) }},
		{"resident_bytes", gauge, "Guest memory that is mapped.", func(v *api.VMStats) float64 { return float64(v.RSSBytes) }},
		{"pss_bytes", gauge, "Guest memory that is mapped, where a shared page counts as its share.", func(v *api.VMStats) float64 { return float64(v.PSSBytes) }},
		{"private_bytes", gauge, "Guest memory that only this VM has mapped.", func(v *api.VMStats) float64 { return float64(v.PrivateBytes) }},
		{"shared_bytes", gauge, "Guest memory that another process has mapped, too.", func(v *api.VMStats) float64 { return float64(v.SharedBytes) }},
		{"anonymous_bytes", gauge, "Guest memory that was written by this VM or copied for it.", func(v *api.VMStats) float64 { return float64(v.AnonBytes) }},
		{"overhead_bytes", gauge, "PSS of the VMM apart from guest memory.", func(v *api.VMStats) float64 { return float64(v.OverheadBytes) }},
	} {
		f := t.family("fcvm_vm_"+m.name, m.kind, m.help)
		for i := range vms {
			f.add(m.value(&vms[i]), of(&vms[i]))
		}
	}
	for _, m := range []metric[api.Serving]{
		{"faults_total", counter, "Page faults that the guest waited for (demand).", func(s *api.Serving) float64 { return float64(s.Faults) }},
		{"write_faults_total", counter, "Demand faults of writes.", func(s *api.Serving) float64 { return float64(s.WriteFaults) }},
		{"slow_faults_total", counter, "Demand faults that waited for the disk.", func(s *api.Serving) float64 { return float64(s.SlowFaults) }},
		{"woken_faults_total", counter, "Demand faults that the template alone answered.", func(s *api.Serving) float64 { return float64(s.WokenFaults) }},
		{"copied_bytes_total", counter, "Pages placed as the VM's own (UFFDIO_COPY).", func(s *api.Serving) float64 { return float64(s.CopiedBytes) }},
		{"zero_bytes_total", counter, "Pages mapped to the zero page (UFFDIO_ZEROPAGE).", func(s *api.Serving) float64 { return float64(s.ZeroBytes) }},
		{"replayed_bytes_total", counter, "Pages of the working set that were placed before the VM asked.", func(s *api.Serving) float64 { return float64(s.ReplayedBytes) }},
		{"removed_bytes_total", counter, "Memory that the guest gave back, each time it did.", func(s *api.Serving) float64 { return float64(s.RemovedBytes) }},
		{"removed_pages", gauge, "Pages that are zeros because the guest gave them back.", func(s *api.Serving) float64 { return float64(s.RemovedPages) }},
		{"parked_answers_total", counter, "Answers that had to wait for a removal (EAGAIN).", func(s *api.Serving) float64 { return float64(s.ParkedAnswers) }},
		{"late_answers_total", counter, "Answers that found the page there already (EEXIST).", func(s *api.Serving) float64 { return float64(s.LateAnswers) }},
		{"handovers_total", counter, "Times that another page server took the VM over.", func(s *api.Serving) float64 { return float64(s.Handovers) }},
	} {
		f := t.family("fcvm_vm_"+m.name, m.kind, m.help)
		for i := range vms {
			if s := vms[i].Serving; s != nil {
				f.add(m.value(s), of(&vms[i]))
			}
		}
	}
}

func servers(t *text, all []api.PageServerStats) {
	of := func(p *api.PageServerStats) labels {
		return labels{"snapshot", p.Snapshot, "policy", p.Policy, "replay", strconv.FormatBool(!p.NoReplay)}
	}
	for _, m := range []metric[api.PageServerStats]{
		{"sessions", gauge, "VMs that are served.", func(p *api.PageServerStats) float64 { return float64(p.Sessions) }},
		{"ended_sessions_total", counter, "VMs that were served and have ended.", func(p *api.PageServerStats) float64 { return float64(p.EndedSessions) }},
		{"failures", gauge, "VMs of late that were killed because a fault could not be answered.", func(p *api.PageServerStats) float64 { return float64(p.Failures) }},
		{"refused_total", counter, "Connections that became no session.", func(p *api.PageServerStats) float64 { return float64(p.Refused) }},
		{"faults_total", counter, "Page faults that were answered.", func(p *api.PageServerStats) float64 { return float64(p.Faults) }},
		{"template_bytes", gauge, "What is in the template.", func(p *api.PageServerStats) float64 { return float64(p.TemplateBytes) }},
		{"template_replayed_bytes", gauge, "What of the template was filled from the working set.", func(p *api.PageServerStats) float64 { return float64(p.ReplayedBytes) }},
		{"template_background_bytes", gauge, "What of the template was filled in the background.", func(p *api.PageServerStats) float64 { return float64(p.BackgroundBytes) }},
		{"working_set_pages", gauge, "Pages that are replayed for a new clone.", func(p *api.PageServerStats) float64 { return float64(p.WorkingSetPages) }},
		{"resident_bytes", gauge, "What the page server itself holds, without the template.", func(p *api.PageServerStats) float64 { return float64(p.RSSBytes) }},
		{"handovers_total", counter, "Times that a page server died and was replaced.", func(p *api.PageServerStats) float64 { return float64(p.Handovers.Count) }},
		{"handover_last_seconds", gauge, "From the last such death until all VMs were served again.", func(p *api.PageServerStats) float64 { return p.Handovers.LastMillis / 1000 }},
		{"handover_longest_seconds", gauge, "From such a death until all VMs were served again, at most.", func(p *api.PageServerStats) float64 { return p.Handovers.LongestMillis / 1000 }},
	} {
		f := t.family("fcvm_pageserver_"+m.name, m.kind, m.help)
		for i := range all {
			f.add(m.value(&all[i]), of(&all[i]))
		}
	}
	for _, m := range []struct {
		name, help string
		latency    func(*api.PageServerStats) *api.Latency
	}{
		{"demand", "Time from reading a page fault to its answer.", func(p *api.PageServerStats) *api.Latency { return &p.Demand }},
		{"replay", "Time to place a run of pages of the working set.", func(p *api.PageServerStats) *api.Latency { return &p.Replay }},
		{"background", "Time to fill a window of the template in the background.", func(p *api.PageServerStats) *api.Latency { return &p.Background }},
	} {
		f := t.family("fcvm_pageserver_"+m.name+"_seconds", histogram, m.help)
		for i := range all {
			l := m.latency(&all[i])
			var bounds []float64
			var counts []uint64
			for _, b := range l.Buckets {
				if b.UpToMicros > 0 {
					bounds, counts = append(bounds, b.UpToMicros/1e6), append(counts, b.Count)
				}
			}
			f.distribution(bounds, counts, float64(l.SumMicros)/1e6, l.Count, of(&all[i]))
		}
	}
}
