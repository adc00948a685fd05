package supervisor

import (
	"os"
	"testing"

	"fcvm/internal/api"
	"fcvm/internal/memmap"
	"fcvm/internal/snapshot"
	"fcvm/internal/workingset"
)

func (b *bench) memoryMap(name string) api.MemoryMap {
	b.t.Helper()
	mm, err := b.c.MemoryMap(b.t.Context(), name)
	if err != nil {
		b.t.Fatal(err)
	}
	return mm
}

func TestMemoryMapOfAGoldenVM(t *testing.T) {
	b := newBench(t)
	vm := b.run("golden", "sleep")
	page := os.Getpagesize()
	b.engine.byID(t, vm.ID).write(300*page, "golden")
	mm := b.memoryMap("golden")
	if mm.VM != "golden" || mm.Snapshot != "" || mm.WorkingSet || mm.PageBytes != int64(page) || int64(len(mm.Pages)) != vm.MemoryBytes/int64(page) {
		t.Fatalf("%d pages of %d bytes: %q, %q, %v", len(mm.Pages), mm.PageBytes, mm.VM, mm.Snapshot, mm.WorkingSet)
	}
	if got := mm.Pages[300]; got != memmap.Private {
		t.Errorf("a written page is %v", got)
	}
	b.memoryMap(vm.ID[:4])
}

func TestMemoryMapOfAClone(t *testing.T) {
	b := newBench(t)
	b.golden() // which has something at 1 MiB
	vms, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Name: "web", Count: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	v := b.engine.byID(t, vms[0].ID)
	golden, written := 1<<20/page, 1<<20/page+1
	if got := v.read(golden*page, 6); got != "golden" {
		t.Errorf("the clone reads %q", got)
	}
	v.write(written*page, "mine")
	mm := b.memoryMap("web")
	if mm.Snapshot != "snap" || mm.WorkingSet || mm.Warning != "" {
		t.Errorf("%q, %v, %q", mm.Snapshot, mm.WorkingSet, mm.Warning)
	}
	if got := mm.Pages[golden]; got != memmap.Shared {
		t.Errorf("a page that was read is %v", got)
	}
	if got := mm.Pages[written]; got != memmap.Private {
		t.Errorf("a page that was written is %v", got)
	}

	// With a working set each state says whether it was foreseen.
	store, err := snapshot.Open(b.layout.Snapshots())
	if err != nil {
		t.Fatal(err)
	}
	snap, err := store.Get("snap")
	if err != nil {
		t.Fatal(err)
	}
	id, err := snap.WorkingSetID()
	if err != nil {
		t.Fatal(err)
	}
	set := workingset.New(id, int64(len(mm.Pages)))
	set.Add(int64(written))
	set.Add(int64(len(mm.Pages) - 1))
	if err := os.WriteFile(snap.WorkingSet(), set.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
	mm = b.memoryMap("web")
	last := mm.Pages[len(mm.Pages)-1]
	if !mm.WorkingSet || mm.Pages[golden] != memmap.Shared || mm.Pages[written] != memmap.Private|memmap.InWorkingSet || last&memmap.InWorkingSet == 0 {
		t.Errorf("%v: %#x, %#x, %#x", mm.WorkingSet, mm.Pages[golden], mm.Pages[written], last)
	}

	// A corrupt one is told, and changes nothing else.
	if err := os.WriteFile(snap.WorkingSet(), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	mm = b.memoryMap("web")
	if mm.WorkingSet || mm.Warning == "" || mm.Pages[written] != memmap.Private {
		t.Errorf("%v, %q, %#x", mm.WorkingSet, mm.Warning, mm.Pages[written])
	}
}

func TestMemoryMapNeedsAVMThatRuns(t *testing.T) {
	b := newBench(t)
	_, err := b.c.MemoryMap(t.Context(), "nobody")
	wantCode(t, err, api.CodeNotFound)
	vm := b.run("web", "sleep")
	if err := b.c.Pause(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	b.memoryMap("web") // a paused one is as good
	b.engine.byID(t, vm.ID).end()
	if _, err := b.c.Wait(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	_, err = b.c.MemoryMap(t.Context(), "web")
	wantCode(t, err, api.CodeState)
}
