package supervisor

import (
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/procmem"
	"fcvm/internal/snapshot"
	"fcvm/internal/uffd"
	"fcvm/internal/vmm"
)

// golden runs a VM with something in its memory and makes a snapshot of it.
func (b *bench) golden() api.VM {
	b.t.Helper()
	vm := b.run("golden", "sleep")
	b.engine.byID(b.t, vm.ID).write(1<<20, "golden")
	res := b.snapshot("golden", "snap")
	if res.PrivateBytes == 0 || res.PauseMillis <= 0 || res.TotalMillis < res.PauseMillis || res.Name != "snap" {
		b.t.Errorf("result: %+v", res)
	}
	return vm
}

// Firecracker before 1.16 lets a clone's guest end the first connection to it.
func TestCloneEndsConnection(t *testing.T) {
	b := newBench(t)
	golden := b.golden()
	for _, lost := range []int32{2, 1} {
		var tries atomic.Int32
		b.engine.setHook(func(s string, v *fakeVM) error {
			if s == "identify" && tries.Add(1) <= lost {
				v.hangUp()
			}
			return nil
		})
		vms, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Name: "web", Count: 1}, nil)
		if lost == 2 {
			if err == nil || !strings.Contains(err.Error(), "identity") {
				t.Errorf("a guest that ends every connection: error %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		id := b.engine.byID(t, vms[0].ID).who()
		if id.Hostname != "web" || len(id.MachineID) != 32 || len(id.Entropy) == 0 || time.Since(id.Wall) > time.Minute {
			t.Errorf("over a second connection, the guest's identity is %+v", id)
		}
		b.clean(golden, vms[0])
	}
}

// A guest that is slow to take its identity gets the time once more: its clock would
// be behind by as long as that took.
func TestClockOfSlowClone(t *testing.T) {
	b := newBench(t)
	b.clean(b.golden())
	var mu sync.Mutex
	var asked []time.Time // when the guest got to each message
	b.engine.setHook(func(s string, _ *fakeVM) error {
		if s != "identify" {
			return nil
		}
		mu.Lock()
		n := len(asked)
		mu.Unlock()
		if n < 2 {
			time.Sleep(2 * clockWithin) // how slow it is
		}
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, time.Now())
		return nil
	})
	vms, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Name: "slow", Count: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	id := b.engine.byID(t, vms[0].ID).who()
	mu.Lock()
	defer mu.Unlock()
	if len(asked) < 3 || id.Hostname != "slow" {
		t.Fatalf("told %d times, identity %+v", len(asked), id)
	}
	// The third message, at the latest, tells a time after the second was through.
	if !id.Wall.After(asked[1]) {
		t.Errorf("the clock was set to %v, and the guest was slow until %v", id.Wall, asked[1])
	}
}

func TestSnapshotAndClone(t *testing.T) {
	b := newBench(t)
	golden := b.golden()
	b.clean(golden)

	var mu sync.Mutex
	var ready []string
	vms, err := b.c.Clone(t.Context(), api.CloneRequest{Snapshot: "snap", Name: "web", Count: 3, Env: []string{"A=1", "B=1"}}, func(v api.VM) {
		mu.Lock()
		defer mu.Unlock()
		ready = append(ready, v.Name)
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(vms) != 3 || len(ready) != 3 {
		t.Fatalf("%d clones, %d ready", len(vms), len(ready))
	}
	seen := map[string]bool{}
	for _, vm := range vms {
		v := b.engine.byID(t, vm.ID)
		if got := v.read(1<<20, 6); got != "golden" {
			t.Errorf("memory of %s: %q", vm.Name, got)
		}
		id := v.who()
		if id.Hostname != vm.Name || len(id.MachineID) != 32 || len(id.Entropy) < 256 || id.Wall.IsZero() {
			t.Errorf("identity of %s: %+v", vm.Name, id)
		}
		if seen[id.MachineID] || seen[string(id.Entropy)] || seen[vm.Name] {
			t.Errorf("%s shares its identity", vm.Name)
		}
		seen[id.MachineID], seen[string(id.Entropy)], seen[vm.Name] = true, true, true
		if vm.Snapshot != "snap" || vm.MemBackend != "uffd" || vm.Policy != "share" || vm.State != api.StateRunning || vm.Image != "img" {
			t.Errorf("%+v", vm)
		}
	}
	for _, n := range []string{"web-1", "web-2", "web-3"} {
		if !seen[n] {
			t.Errorf("no clone %s", n)
		}
	}
	if b.servers.launched != 1 {
		t.Errorf("%d page servers for one snapshot", b.servers.launched)
	}
	st, err := b.c.Exec(t.Context(), "web-1", api.ExecRequest{Command: []string{"env"}, Env: []string{"B=2"}})
	if err != nil {
		t.Fatal(err)
	}
	if out, _ := readFrames(t, st); out != "env|A=1,B=2" {
		t.Errorf("environment of exec in a clone: %q", out)
	}
	_ = st.Close()

	// A clone of another policy has another page server; the last one of each
	// stops it.
	copied := b.clone(api.CloneRequest{Snapshot: "snap", Name: "copied", Policy: "copy"})
	if len(b.servers.running()) != 2 {
		t.Errorf("%d page servers", len(b.servers.running()))
	}
	b.clean(append(append(vms, golden), copied...)...)
	for _, vm := range vms {
		if len(b.servers.running()) != 2 {
			t.Errorf("page servers before the last clone's end: %d", len(b.servers.running()))
		}
		if err := b.c.Remove(t.Context(), vm.Name, true); err != nil {
			t.Fatal(err)
		}
	}
	if len(b.servers.running()) != 1 {
		t.Errorf("page servers after the last clone's end: %d", len(b.servers.running()))
	}
	store, err := snapshot.Open(b.layout.Snapshots())
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Remove("snap"); !errors.Is(err, snapshot.ErrInUse) {
		t.Errorf("removing a snapshot with a clone: %v", err)
	}
	if err := b.c.Remove(t.Context(), "copied", true); err != nil {
		t.Fatal(err)
	}
	if err := store.Remove("snap"); err != nil {
		t.Errorf("removing a snapshot without clones: %v", err)
	}
	b.clean(golden)
}

func TestCloneOfAClone(t *testing.T) {
	b := newBench(t)
	b.golden()
	one := b.clone(api.CloneRequest{Snapshot: "snap", Name: "one"})[0]
	b.engine.byID(t, one.ID).write(2<<20, "of one")
	res := b.snapshot("one", "second")
	if want := int64(os.Getpagesize()); res.PrivateBytes != want {
		t.Errorf("private bytes %d, want %d", res.PrivateBytes, want)
	}
	two := b.clone(api.CloneRequest{Snapshot: "second", Name: "two", MemBackend: "file"})[0]
	v := b.engine.byID(t, two.ID)
	if v.read(1<<20, 6) != "golden" || v.read(2<<20, 6) != "of one" {
		t.Errorf("memory: %q, %q", v.read(1<<20, 6), v.read(2<<20, 6))
	}
	if two.MemBackend != "file" || two.Policy != "" || two.Snapshot != "second" {
		t.Errorf("%+v", two)
	}
}

// TestSnapshotTakesThePausesState: what changes between the copy before the
// pause and the pause is in the snapshot.
func TestSnapshotTakesThePausesState(t *testing.T) {
	b := newBench(t)
	vm := b.run("golden", "sleep")
	v := b.engine.byID(t, vm.ID)
	v.write(0, "early")
	v.write(8<<20, "early")
	b.engine.setHook(func(s string, v *fakeVM) error {
		if s == "pause" {
			v.write(0, "later")
			v.write(8<<20, "\x00\x00\x00\x00\x00")
			v.write(16<<20, "fresh")
		}
		return nil
	})
	b.snapshot("golden", "snap")
	c := b.engine.byID(t, b.clone(api.CloneRequest{Snapshot: "snap", MemBackend: "file"})[0].ID)
	if c.read(0, 5) != "later" || c.read(8<<20, 5) != "\x00\x00\x00\x00\x00" || c.read(16<<20, 5) != "fresh" {
		t.Errorf("memory: %q, %q, %q", c.read(0, 5), c.read(8<<20, 5), c.read(16<<20, 5))
	}
}

func TestSnapshotOfAPausedVM(t *testing.T) {
	b := newBench(t)
	vm := b.run("golden", "sleep")
	if err := b.c.Pause(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	b.snapshot("golden", "snap")
	if !b.engine.byID(t, vm.ID).isPaused() {
		t.Error("the snapshot resumed a paused VM")
	}
	b.clone(api.CloneRequest{Snapshot: "snap"})
	if err := b.c.Resume(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	if _, code := b.exec("golden", "true"); code != 5 {
		t.Errorf("exec after all that: %d", code)
	}
}

func TestSnapshotFailuresLeaveNothing(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name     string
		set      func(b *bench)
		vm, snap string
		code     api.Code
		want     string
	}{
		{"unknown VM", nil, "nosuch", "new", api.CodeNotFound, "nosuch"},
		{"bad name", nil, "golden", "../../etc", api.CodeInvalid, "etc"},
		{"taken", nil, "golden", "snap", api.CodeConflict, "exists: snap"},
		{"pause", func(b *bench) { b.engine.failAt("pause", boom) }, "golden", "new", api.CodeInternal, "boom"},
		{"save", func(b *bench) { b.engine.failAt("save", boom) }, "golden", "new", api.CodeInternal, "boom"},
		{"ends", func(b *bench) {
			b.engine.setHook(func(s string, v *fakeVM) error {
				if s == "save" {
					return errors.Join(procmem.ErrGone, boom)
				}
				return nil
			})
		}, "golden", "new", api.CodeInternal, "boom"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			golden := b.golden()
			if tt.set != nil {
				tt.set(b)
			}
			_, err := b.c.Snapshot(t.Context(), api.SnapshotRequest{VM: tt.vm, Name: tt.snap})
			if e := apiError(t, err, tt.code); !strings.Contains(e.Message, tt.want) {
				t.Errorf("message: %s", e.Message)
			}
			b.engine.setHook(nil)
			b.clean(golden)
			if out, code := b.exec("golden", "true"); code != 5 {
				t.Errorf("the VM does not run on: %q, %d", out, code)
			}
			if got := sorted(t, b.layout.Snapshots()); len(got) != 1 {
				t.Errorf("snapshots: %v", got)
			}
			b.snapshot("golden", "new") // and the next one succeeds
		})
	}
}

// TestSnapshotsOfOneVMTakeTurns: two at once would resume each other's pause.
func TestSnapshotsOfOneVMTakeTurns(t *testing.T) {
	b := newBench(t)
	b.run("golden", "sleep")
	var mu sync.Mutex
	inside := 0
	b.engine.setHook(func(s string, v *fakeVM) error {
		mu.Lock()
		defer mu.Unlock()
		switch s {
		case "pause":
			if inside++; inside > 1 {
				return errors.New("paused twice")
			}
		case "resume":
			inside--
		}
		return nil
	})
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b", "c"} {
		wg.Go(func() {
			if _, err := b.c.Snapshot(t.Context(), api.SnapshotRequest{VM: "golden", Name: name}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestCloneFailuresLeaveNothing(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name string
		set  func(b *bench, r *api.CloneRequest)
		code api.Code
		want string
	}{
		{"unknown snapshot", func(_ *bench, r *api.CloneRequest) { r.Snapshot = "snop" }, api.CodeNotFound, "snop"},
		{"backend", func(_ *bench, r *api.CloneRequest) { r.MemBackend = "tape" }, api.CodeInvalid, "tape"},
		{"policy", func(_ *bench, r *api.CloneRequest) { r.Policy = "steal" }, api.CodeInvalid, "steal"},
		{"merge what is shared", func(_ *bench, r *api.CloneRequest) { r.Merge = true }, api.CodeInvalid, "policy copy only"},
		{"count", func(_ *bench, r *api.CloneRequest) { r.Count = -1 }, api.CodeInvalid, "-1"},
		{"name", func(_ *bench, r *api.CloneRequest) { r.Name = "no/good" }, api.CodeInvalid, "no/good"},
		{"taken", func(_ *bench, r *api.CloneRequest) { r.Name = "taken" }, api.CodeConflict, "taken-2"},
		{"ports", func(_ *bench, r *api.CloneRequest) {
			r.Ports = []vmm.Port{{HostPort: 65534, GuestPort: 80, Proto: "tcp"}}
		}, api.CodeInvalid, "65536"},
		{"version", func(b *bench, _ *api.CloneRequest) { b.engine.version = "2.0" }, api.CodeUnavailable, "1.0"},
		{"page server", func(b *bench, _ *api.CloneRequest) { b.servers.fail = boom }, api.CodeInternal, "boom"},
		{"no userfaultfd", func(b *bench, _ *api.CloneRequest) { b.engine.failAt("restore-uffd", uffd.ErrNotPermitted) }, api.CodeUnavailable, "not permitted"},
		{"restore", func(b *bench, _ *api.CloneRequest) { b.engine.failAt("restore-uffd", boom) }, api.CodeInternal, "boom"},
		{"agent", func(b *bench, _ *api.CloneRequest) { b.engine.failAt("dial", boom) }, api.CodeInternal, "boom"},
		{"identify", func(b *bench, _ *api.CloneRequest) { b.engine.failAt("identify", boom) }, api.CodeInternal, "boom"},
		{"last one", func(b *bench, _ *api.CloneRequest) {
			var mu sync.Mutex
			n := 0
			b.engine.setHook(func(s string, _ *fakeVM) error {
				mu.Lock()
				defer mu.Unlock()
				if s == "identify" {
					n++
				}
				if n == 3 {
					return boom
				}
				return nil
			})
		}, api.CodeInternal, "boom"},
		{"crash", func(b *bench, _ *api.CloneRequest) {
			b.engine.setHook(func(s string, v *fakeVM) error {
				if s == "identify" {
					v.end()
				}
				return nil
			})
		}, api.CodeInternal, "last words"},
		{"truncated", func(b *bench, _ *api.CloneRequest) {
			if err := os.Truncate(b.layout.Snapshots()+"/snap/mem.img", 4096); err != nil {
				b.t.Fatal(err)
			}
		}, api.CodeDamaged, "mem.img"},
		{"edited", func(b *bench, _ *api.CloneRequest) {
			f, err := os.OpenFile(b.layout.Snapshots()+"/snap/mem.img", os.O_WRONLY, 0)
			if err != nil {
				b.t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("x"), 1<<20); err != nil {
				b.t.Fatal(err)
			}
		}, api.CodeDamaged, "mem.img"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			golden := b.golden()
			taken := b.run("taken-2", "sleep")
			req := api.CloneRequest{Snapshot: "snap", Name: "c", Count: 3}
			tt.set(b, &req)
			_, err := b.c.Clone(t.Context(), req, nil)
			if e := apiError(t, err, tt.code); !strings.Contains(e.Message, tt.want) {
				t.Errorf("message: %s", e.Message)
			}
			b.engine.setHook(nil)
			b.clean(golden, taken)
			if n := len(b.servers.running()); n != 0 {
				t.Errorf("%d page servers are left", n)
			}
		})
	}
}

func TestCloneFallsBackToTheFile(t *testing.T) {
	b := newBench(t)
	b.golden()
	b.engine.failAt("restore-uffd", vmm.ErrAttach)
	vm := b.clone(api.CloneRequest{Snapshot: "snap"})[0]
	if vm.MemBackend != "file" || vm.Policy != "" || len(vm.Warnings) != 1 || !strings.Contains(vm.Warnings[0], "attach") {
		t.Errorf("%+v", vm)
	}
	if n := len(b.servers.running()); n != 0 {
		t.Errorf("%d page servers serve nobody", n)
	}
}

func TestClonePorts(t *testing.T) {
	b := newBench(t)
	b.golden()
	base := b.clone(api.CloneRequest{Snapshot: "snap", Ports: []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}}})[0]
	port := base.Ports[0].HostPort
	if port == 0 || port > 65000 {
		t.Skipf("the kernel chose port %d, and the test needs room above", port)
	}
	_, err := b.c.Clone(t.Context(), api.CloneRequest{
		Snapshot: "snap", Name: "c", Count: 3, Ports: []vmm.Port{{HostIP: "127.0.0.1", HostPort: port - 1, GuestPort: 80, Proto: "tcp"}},
	}, nil)
	if e := apiError(t, err, api.CodeConflict); !strings.Contains(e.Message, base.Name) {
		t.Errorf("message: %s", e.Message)
	}
}

// TestNoReplay: who does not want the working set gets a page server that has none.
func TestNoReplay(t *testing.T) {
	b := newBench(t)
	b.golden()
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "with"})
	vm := b.clone(api.CloneRequest{Snapshot: "snap", Name: "without", NoReplay: true})[0]
	if !vm.NoReplay || vm.Policy != "share" {
		t.Errorf("%+v", vm)
	}
	if got, err := b.c.Get(t.Context(), "with"); err != nil || got.NoReplay {
		t.Errorf("%+v, %v", got, err)
	}
	var sets []string
	for _, p := range b.servers.running() {
		sets = append(sets, p.config.WorkingSet)
	}
	if len(sets) != 2 || !slices.Contains(sets, "") || sets[0] == sets[1] {
		t.Errorf("working sets of the page servers: %q", sets)
	}
	b.restart()
	b.clone(api.CloneRequest{Snapshot: "snap", NoReplay: true})
	if b.servers.launched != 2 {
		t.Errorf("%d page servers launched, want 2", b.servers.launched)
	}
}

// TestPageServersAreUpgraded: whenever one is found that runs already, whether it
// is of the program that is installed now is looked at.
func TestPageServersAreUpgraded(t *testing.T) {
	b := newBench(t)
	b.golden()
	asked := func(want int) {
		t.Helper()
		p := b.servers.running()[0]
		for begun := time.Now(); ; time.Sleep(time.Millisecond) {
			b.servers.mu.Lock()
			n := p.upgrades
			b.servers.mu.Unlock()
			if n == want {
				return
			}
			if n > want || time.Since(begun) > time.Minute {
				t.Fatalf("asked for %d times, want %d", n, want)
			}
		}
	}
	b.clone(api.CloneRequest{Snapshot: "snap"})
	asked(0)
	b.clone(api.CloneRequest{Snapshot: "snap"})
	asked(1)
	b.restart()
	asked(2)
}

// TestDeadPageServer: its clones are ended, and say why.
func TestDeadPageServer(t *testing.T) {
	b := newBench(t)
	b.golden()
	vms := b.clone(api.CloneRequest{Snapshot: "snap", Name: "c", Count: 2})
	for _, p := range b.servers.running() {
		if err := p.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, vm := range vms {
		got, err := b.c.Wait(t.Context(), vm.Name)
		if err != nil || !strings.Contains(got.Error, "page server") || !strings.Contains(got.Error, "killed by the test") {
			t.Errorf("%+v, %v", got, err)
		}
	}
	b.clone(api.CloneRequest{Snapshot: "snap"}) // has a new one
	if b.servers.launched != 2 {
		t.Errorf("%d page servers launched", b.servers.launched)
	}
}

func TestStats(t *testing.T) {
	b := newBench(t)
	b.golden()
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "c", Count: 2})
	b.run("ended", "exit", "0")
	if _, err := b.c.Wait(t.Context(), "ended"); err != nil {
		t.Fatal(err)
	}
	st, err := b.c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Version != api.SchemaVersion || len(st.VMs) != 3 || len(st.PageServers) != 1 || st.PageServers[0].Faults != 7 {
		t.Errorf("%+v", st)
	}
	if st.VMs[0].Name != "golden" || st.VMs[0].AnonBytes == 0 || st.VMs[0].MemoryBytes != testMemory {
		t.Errorf("%+v", st.VMs[0])
	}
	if st.Total.MemoryBytes != 3*testMemory || st.Total.UnsharedBytes == 0 || st.Total.HeldBytes == 0 {
		t.Errorf("%+v", st.Total)
	}
}
