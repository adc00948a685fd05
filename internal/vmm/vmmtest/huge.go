package vmmtest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"fcvm/internal/memstat"
	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/hugepages"
)

// Memory of huge pages is saved, copied for clones, and saved again. An engine that has none
// says so.
func (l *lab) testHugePages(t *testing.T) {
	info, err := l.engine.Info(within(t))
	if err != nil {
		t.Fatal(err)
	}
	huge := *l
	huge.machine.HugePages = true
	if !info.HugePages {
		c := huge.bootConfig(huge.place(t, "huge"), nil)
		if v, err := l.engine.Boot(within(t), c); !errors.Is(err, vmm.ErrNoHugePages) {
			t.Errorf("VM %v, error %v", v, err)
		}
		return
	}
	const guests = 2 // at a time
	release, err := pstest.ReserveHugePages(guests * memoryBytes / hugepages.Size)
	if errors.Is(err, pstest.ErrSkip) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release) // when all VMs have ended
	huge.bootGolden(t)
	dir := filepath.Join(l.dir, "huge")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(filepath.Join(dir, "clone"), 0o700)); err != nil {
		t.Fatal(err)
	}
	s := huge.golden.take(t, dir, "")
	huge.golden.end(t)

	m := huge.memory(t, backends[2], s)
	for _, wrong := range []vmm.Memory{{Backend: vmm.BackendFile, File: m.File}, {Backend: m.Backend, File: m.File, Socket: m.Socket}} {
		p := huge.place(t, "wrong")
		if v, err := l.engine.Restore(within(t), huge.restoreConfig(p, wrong, s, nil)); err == nil {
			_ = huge.owned(t, v, p, 0).Kill()
			t.Errorf("a clone of huge pages runs with the memory %+v", wrong)
		}
		nothingLeft(t, p)
	}
	clone := huge.restore(t, m, s)
	clone.want(t, "verify", "ok")
	clone.want(t, "write 700", "ok")
	u, err := memstat.Process(clone.Handle().PID, clone.Handle().Regions)
	if err != nil {
		t.Fatal(err)
	}
	if u.Private == 0 || u.Private%hugepages.Size != 0 || u.Private != u.RSS || u.Private > memoryBytes {
		t.Errorf("the clone holds %+v, which is not of huge pages", u)
	}
	child := huge.cloneAgain(t, backends[2], clone, s, filepath.Join(dir, "clone"))
	clone.end(t)
	child.end(t)
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
}
