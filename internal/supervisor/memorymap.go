package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"fcvm/internal/api"
	"fcvm/internal/memmap"
	"fcvm/internal/pagesum"
	"fcvm/internal/procmem"
	"fcvm/internal/vmm"
)

// MemoryMap implements [api.Backend]. The VM may run meanwhile: each page is told
// as it was at some moment of the call.
func (s *Supervisor) MemoryMap(ctx context.Context, name string) (api.MemoryMap, error) {
	m, err := s.find(name)
	if err != nil {
		return api.MemoryMap{}, err
	}
	vm, _, err := m.running()
	if err != nil {
		return api.MemoryMap{}, err
	}
	m.mu.Lock()
	rec := m.rec
	m.mu.Unlock()
	mm := api.MemoryMap{Version: api.SchemaVersion, VM: m.name, Snapshot: rec.VM.Snapshot, PageBytes: int64(os.Getpagesize())}
	mm.Pages = make([]memmap.Page, rec.Machine.MemoryBytes/mm.PageBytes)
	h := vm.Handle()
	if err := mapPages(ctx, h.PID, h.Regions, mm.Pages, mm.PageBytes); err != nil {
		if errors.Is(err, procmem.ErrGone) {
			err = wrongState("VM %s is not running", m.name)
		}
		return api.MemoryMap{}, explain(err)
	}
	select {
	case <-vm.Done(): // what was read may be of whoever got its pid
		return api.MemoryMap{}, wrongState("VM %s is not running", m.name)
	default:
	}
	if mm.Snapshot != "" {
		s.addWorkingSet(&mm)
	}
	return mm, nil
}

// mapPages asks the kernel what a VMM has of each page.
func mapPages(ctx context.Context, pid int, regions []vmm.Region, pages []memmap.Page, pageBytes int64) error {
	proc, err := procmem.OpenPagemap(pid)
	if err != nil {
		return err
	}
	defer func() { _ = proc.Close() }()
	for _, r := range regions {
		err := proc.Pages(r.Addr, r.Size, func(run procmem.Run, k procmem.Kind) error {
			state := memmap.Private
			switch k {
			case procmem.Zero:
				state = memmap.Zero
			case procmem.File:
				state = memmap.Shared
			}
			first := (r.Offset + run.Offset) / pageBytes
			for i := range pages[first : first+run.Len/pageBytes] {
				pages[first+int64(i)] = state
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// addWorkingSet marks what later clones of the VM's snapshot get before they ask.
// Without a usable one the map is no worse, and says why.
func (s *Supervisor) addWorkingSet(mm *api.MemoryMap) {
	snap, err := s.snapshots.Get(mm.Snapshot)
	if err != nil {
		mm.Warning = err.Error()
		return
	}
	set, err := snap.ReadWorkingSet()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err == nil && (mm.PageBytes != pagesum.PageSize || set.Pages() != int64(len(mm.Pages))):
		err = fmt.Errorf("working set of snapshot %s is of another memory", mm.Snapshot)
	}
	if err != nil {
		mm.Warning = err.Error()
		return
	}
	mm.WorkingSet = true
	for p := range set.All() {
		mm.Pages[p] |= memmap.InWorkingSet
	}
}
