package supervisor

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
)

// sparesBench is one whose supervisor keeps n spares, with a snapshot "snap".
func sparesBench(t testing.TB, n int) (*bench, api.VM) {
	t.Helper()
	b := idleBench(t)
	b.options = func(o *Options) { o.Spares = n }
	b.start()
	return b, b.golden()
}

// waiting returns the VMMs that are paused and nobody's.
func (b *bench) waiting() []*fakeVM {
	b.t.Helper()
	vms, err := b.c.List(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return slices.DeleteFunc(b.engine.running(), func(v *fakeVM) bool {
		return slices.ContainsFunc(vms, func(vm api.VM) bool { return vm.ID == v.place.ID })
	})
}

// spare waits until n spares wait, as the stats tell, and returns the first.
func (b *bench) spare(n int) *fakeVM {
	b.t.Helper()
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		st, err := b.c.Stats(b.t.Context())
		if err != nil {
			b.t.Fatal(err)
		}
		if st.Total.Spares == n {
			break
		}
		if time.Since(begun) > time.Minute {
			b.t.Fatalf("%d spares wait, want %d", st.Total.Spares, n)
		}
	}
	found := b.waiting()
	if len(found) != n {
		b.t.Fatalf("%d VMMs are nobody's, want %d", len(found), n)
	}
	if n == 0 {
		return nil
	}
	return found[0]
}

func (b *bench) remove(name string) {
	b.t.Helper()
	if err := b.c.Remove(b.t.Context(), name, true); err != nil {
		b.t.Fatalf("remove %s: %v", name, err)
	}
}

// free fails while anything holds the snapshot, and removes it.
func (b *bench) free(name string) {
	b.t.Helper()
	store, err := snapshot.Open(b.layout.Snapshots())
	if err != nil {
		b.t.Fatal(err)
	}
	if err := store.Remove(name); err != nil {
		b.t.Error(err)
	}
}

func TestSpareBecomesTheNextClone(t *testing.T) {
	b, golden := sparesBench(t, 1)
	first := b.clone(api.CloneRequest{Snapshot: "snap", Name: "first"})[0]
	sp := b.spare(1)
	if !sp.isPaused() || len(sp.ports) != 0 {
		t.Errorf("a spare runs or has ports: %+v", sp.ports)
	}
	b.engine.failAt("restore-uffd", errors.New("started anew"))
	vm := b.clone(api.CloneRequest{
		Snapshot: "snap", Name: "next", Env: []string{"A=1"},
		Ports: []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}},
	})[0]
	b.engine.setHook(nil)
	if vm.ID != sp.place.ID || vm.State != api.StateRunning || vm.Hostname != "next" || vm.PID == 0 || vm.Policy != "share" || vm.MemBackend != "uffd" {
		t.Errorf("%+v is not the spare %s", vm, sp.place.ID)
	}
	sp.mu.Lock()
	if sp.paused || !slices.Equal(sp.ports, vm.Ports) || sp.identity.Hostname != "next" {
		t.Errorf("paused %v, ports %+v of %+v, identity %+v", sp.paused, sp.ports, vm.Ports, sp.identity)
	}
	sp.mu.Unlock()
	if out, code := b.exec("next", "env"); code != 5 || !strings.Contains(out, "A=1") {
		t.Errorf("exec: %q, %d", out, code)
	}
	// The working set is of guests that run.
	p := b.servers.running()[0]
	b.servers.mu.Lock()
	if len(p.recorded) < 2 || p.recorded[0] || !slices.Contains(p.recorded, true) {
		t.Errorf("recorded: %v, want that it waits, then that it runs", p.recorded)
	}
	b.servers.mu.Unlock()
	// It is like any other from here on: also for the next supervisor.
	b.spare(1)
	b.restart()
	if _, code := b.exec("next", "true"); code != 5 {
		t.Errorf("exec after a restart: %d", code)
	}
	b.clean(golden, first, vm)
}

// TestSparesEndWithTheLastClone: when the removal returns, nothing holds the
// snapshot any more, whether spares were ready or still starting.
func TestSparesEndWithTheLastClone(t *testing.T) {
	for _, backend := range []string{"uffd", "file"} {
		b, golden := sparesBench(t, 2)
		b.clone(api.CloneRequest{Snapshot: "snap", Name: "c", Count: 2, MemBackend: backend})
		b.spare(2)
		b.remove("c-1")
		b.spare(2)
		b.remove("c-2")
		b.clean(golden)
		if n := len(b.servers.running()); n != 0 {
			t.Errorf("%d page servers are left", n)
		}
		for range 20 {
			b.remove(b.clone(api.CloneRequest{Snapshot: "snap", MemBackend: backend})[0].Name)
			b.clean(golden)
		}
		b.free("snap")
	}
}

func TestSparesEndWithTheSupervisor(t *testing.T) {
	b, golden := sparesBench(t, 1)
	vm := b.clone(api.CloneRequest{Snapshot: "snap", Name: "c"})[0]
	b.spare(1)
	b.end()
	if n := len(b.engine.running()); n != 2 {
		t.Errorf("%d VMMs run, want the golden VM's and the clone's", n)
	}
	b.start()
	b.clean(golden, vm)
	// An adopted clone keeps spares alive as any other does.
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "second"})
	b.spare(1)
	b.remove("second")
	b.spare(1)
	b.remove("c")
	b.clean(golden)
}

// TestSparesAreOfOneKind: a clone gets none of another policy or backend, and each
// kind's end with its own last clone.
func TestSparesAreOfOneKind(t *testing.T) {
	b, golden := sparesBench(t, 1)
	if n := len(b.waiting()); n != 0 {
		t.Errorf("%d spares without a clone", n)
	}
	kinds := []api.CloneRequest{
		{Snapshot: "snap", Name: "share"},
		{Snapshot: "snap", Name: "copy", Policy: "copy"},
		{Snapshot: "snap", Name: "no-replay", NoReplay: true},
		{Snapshot: "snap", Name: "file", MemBackend: "file", Policy: "copy", NoReplay: true},
	}
	for i, req := range kinds {
		before := b.waiting()
		vm := b.clone(req)[0]
		for _, sp := range before {
			if vm.ID == sp.place.ID {
				t.Errorf("%s got a spare of another kind", vm.Name)
			}
		}
		b.spare(i + 1)
	}
	// The policy is the page server's.
	sp := b.waiting()
	vm := b.clone(api.CloneRequest{Snapshot: "snap", Name: "file2", MemBackend: "file"})[0]
	if !slices.ContainsFunc(sp, func(v *fakeVM) bool { return v.place.ID == vm.ID }) {
		t.Error("a spare with its memory from the file is not used")
	}
	b.spare(len(kinds))
	b.remove("file2")
	for i, req := range kinds {
		b.remove(req.Name)
		b.spare(len(kinds) - 1 - i)
	}
	b.clean(golden)
}

func TestManyTakeWhatThereIs(t *testing.T) {
	b, golden := sparesBench(t, 2)
	vms := b.clone(api.CloneRequest{Snapshot: "snap", Name: "a"})
	b.spare(2)
	var mu sync.Mutex
	fresh := 0
	b.engine.setHook(func(s string, _ *fakeVM) error {
		mu.Lock()
		defer mu.Unlock()
		if s == "restore-uffd" {
			fresh++
		}
		return nil
	})
	more := b.clone(api.CloneRequest{Snapshot: "snap", Name: "m", Count: 4})
	if fresh != 2 {
		t.Errorf("%d of 4 clones were started anew, want 2", fresh)
	}
	b.spare(2)
	b.restart()
	b.clean(append(append(vms, more...), golden)...)
}

// TestCloneWaitsForASpareThatStarts: it is ahead of one that would start now.
func TestCloneWaitsForASpareThatStarts(t *testing.T) {
	b, _ := sparesBench(t, 1)
	starting, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b.engine.setHook(func(s string, _ *fakeVM) error {
		if s == "ahead-uffd" {
			once.Do(func() { close(starting) })
			<-goOn
		}
		return nil
	})
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "first"})
	<-starting
	b.engine.failAt("restore-uffd", errors.New("started anew"))
	done := make(chan error, 1)
	go func() {
		_, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Name: "next"}, nil)
		done <- err
	}()
	for {
		if _, err := b.c.Get(t.Context(), "next"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSpareIsOnlySpeed: whatever becomes of it, the next clone comes up.
func TestSpareIsOnlySpeed(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name string
		do   func(b *bench, sp *fakeVM)
	}{
		{"ended", func(_ *bench, sp *fakeVM) { sp.end() }},
		{"ends when it is taken", func(b *bench, _ *fakeVM) {
			b.engine.setHook(func(s string, v *fakeVM) error {
				if s == "resume" {
					b.engine.setHook(nil)
					v.end()
					return fmt.Errorf("resume: %w", vmm.ErrGone)
				}
				return nil
			})
		}},
		{"cannot be started", func(b *bench, sp *fakeVM) {
			b.engine.failAt("ahead-uffd", boom)
			sp.end()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, golden := sparesBench(t, 1)
			vms := b.clone(api.CloneRequest{Snapshot: "snap", Name: "first"})
			tt.do(b, b.spare(1))
			for i := range 3 {
				vms = append(vms, b.clone(api.CloneRequest{
					Snapshot: "snap", Name: fmt.Sprint("next", i), Ports: []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}},
				})...)
			}
			b.restart()
			b.clean(append(vms, golden)...)
			for _, vm := range vms {
				if out, code := b.exec(vm.Name, "true"); code != 5 {
					t.Errorf("exec in %s: %q, %d", vm.Name, out, code)
				}
			}
		})
	}
}

// TestNoSpareIsTriedAgain: one that cannot be started costs one try.
func TestNoSpareIsTriedAgain(t *testing.T) {
	b, _ := sparesBench(t, 1)
	tries := make(chan struct{}, 100)
	b.engine.setHook(func(s string, _ *fakeVM) error {
		if s != "ahead-uffd" {
			return nil
		}
		tries <- struct{}{}
		return errors.New("boom")
	})
	b.clone(api.CloneRequest{Snapshot: "snap"})
	<-tries
	for range 5 {
		b.clone(api.CloneRequest{Snapshot: "snap"})
	}
	b.end()
	if n := len(tries); n > 1 { // the second may have begun before the first failed
		t.Errorf("%d more tries", n)
	}
}

// TestFailedCloneEndsItsSpare: what is said is what is said without spares, and
// nothing is left.
func TestFailedCloneEndsItsSpare(t *testing.T) {
	boom := errors.New("boom")
	for _, step := range []string{"publish", "resume", "identify", "dial"} {
		t.Run(step, func(t *testing.T) {
			b, golden := sparesBench(t, 1)
			b.clone(api.CloneRequest{Snapshot: "snap", Name: "first"})
			b.spare(1)
			b.engine.failAt(step, boom)
			_, err := b.c.Clone(t.Context(), api.CloneRequest{
				Snapshot: "snap", Name: "next", Ports: []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}},
			}, nil)
			if e := apiError(t, err, api.CodeInternal); !strings.Contains(e.Message, "boom") {
				t.Errorf("message: %s", e.Message)
			}
			b.engine.setHook(nil)
			b.spare(1) // for the next one
			b.remove("first")
			b.clean(golden)
		})
	}
}

// TestNameTakenLeavesTheSpare: a typing error does not cost the next clone's speed.
func TestNameTakenLeavesTheSpare(t *testing.T) {
	b, _ := sparesBench(t, 1)
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "first"})
	sp := b.spare(1)
	_, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Name: "first"}, nil)
	wantCode(t, err, api.CodeConflict)
	if now := b.spare(1); now != sp {
		t.Error("the spare was ended, or is another one")
	}
}

func TestDeadPageServerEndsItsSpare(t *testing.T) {
	b, golden := sparesBench(t, 1)
	vm := b.clone(api.CloneRequest{Snapshot: "snap", Name: "c"})[0]
	sp := b.spare(1)
	for _, p := range b.servers.running() {
		if err := p.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := b.c.Wait(t.Context(), "c"); err != nil || !strings.Contains(got.Error, "page server") {
		t.Errorf("%+v, %v", got, err)
	}
	<-sp.done
	b.spare(0)
	b.clean(golden, vm)
}

// TestSparesFallBackToTheFile: where userfaultfd cannot be attached, a spare is what
// a clone would be, and the clone carries the warning.
func TestSparesFallBackToTheFile(t *testing.T) {
	b, _ := sparesBench(t, 1)
	b.engine.setHook(func(s string, _ *fakeVM) error {
		if s == "restore-uffd" || s == "ahead-uffd" {
			return vmm.ErrAttach
		}
		return nil
	})
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "first"})
	sp := b.spare(1)
	vm := b.clone(api.CloneRequest{Snapshot: "snap", Name: "next"})[0]
	if vm.ID != sp.place.ID || vm.MemBackend != "file" || vm.Policy != "" || len(vm.Warnings) != 1 {
		t.Errorf("%+v", vm)
	}
	b.spare(1) // while the next one starts it has a page server, which it gives up
	if n := len(b.servers.running()); n != 0 {
		t.Errorf("%d page servers serve nobody", n)
	}
}

func TestStatsCountSpares(t *testing.T) {
	b, _ := sparesBench(t, 1)
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "c"})
	b.spare(1)
	st, err := b.c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(st.VMs) != 2 || st.Total.Spares != 1 || st.Total.SpareBytes == 0 || st.Total.MemoryBytes != 2*testMemory {
		t.Errorf("%d VMs, %+v", len(st.VMs), st.Total)
	}
}

// TestSparesUnderLoad: clones come and go on all sides, and nothing is left.
func TestSparesUnderLoad(t *testing.T) {
	b, golden := sparesBench(t, 2)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for k := range 6 {
				vms, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Count: 1 + (i+k)%2}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				for _, vm := range vms {
					if err := b.c.Remove(t.Context(), vm.Name, true); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	b.clean(golden)
	b.free("snap")
}
