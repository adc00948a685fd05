package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/datadir"
	"fcvm/internal/guest"
	"fcvm/internal/image"
	"fcvm/internal/vmm"
)

const testMemory = 64 << 20

// bench is a data directory with everything faked around a real supervisor.
type bench struct {
	t       testing.TB
	layout  *datadir.Layout
	engine  *fakeEngine
	servers *fakeServers
	images  *fakeImages
	guest   error // why no guest is set up
	options func(*Options)

	c    *api.Client
	stop func()
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := idleBench(t)
	b.start()
	return b
}

// idleBench is one whose supervisor does not run yet.
func idleBench(t testing.TB) *bench {
	t.Helper()
	// Short, for the sake of sockets.
	dir, err := os.MkdirTemp("", "fs")
	if err != nil {
		t.Fatal(err)
	}
	l := &datadir.Layout{Dir: filepath.Join(dir, "data"), Runtime: filepath.Join(dir, "run")}
	for _, d := range []string{l.VMs(), l.Snapshots(), l.Runtime} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{t: t, layout: l, engine: newFakeEngine(), servers: newFakeServers(), images: &fakeImages{dir: dir}}
	t.Cleanup(func() {
		b.end()
		for _, v := range b.engine.running() {
			v.end()
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *bench) opts() Options {
	o := Options{
		Layout: b.layout, Version: "test", Log: slog.New(slog.NewTextHandler(testLog{b.t}, nil)),
		Engines:     []vmm.Named{{Name: "fake", Engine: b.engine}},
		PageServers: b.servers, Images: b.images,
		Guest: func() (*guest.Assets, error) { return &guest.Assets{Kernel: "/k", Initrd: "/i"}, b.guest },
	}
	if b.options != nil {
		b.options(&o)
	}
	return o
}

func (b *bench) start() {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, b.opts()) }()
	b.stop = func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("supervisor: %v", err)
		}
	}
	for {
		c, err := api.Dial(ctx, b.layout, api.DialOptions{})
		if err == nil {
			b.c = c
			return
		}
		if !errors.Is(err, api.ErrNoSupervisor) {
			b.t.Fatal(err)
		}
		select {
		case err := <-done:
			b.t.Fatalf("supervisor ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// end stops the supervisor; VMs run on.
func (b *bench) end() {
	if b.c != nil {
		_ = b.c.Close()
		b.c = nil
		b.stop()
	}
}

// restart is what the next command finds after the supervisor has gone.
func (b *bench) restart() {
	b.t.Helper()
	b.end()
	b.start()
}

func (b *bench) run(name string, cmd ...string) api.VM {
	b.t.Helper()
	vm, err := b.c.Run(b.t.Context(), api.RunRequest{Name: name, Image: "img", ImageID: "img", Command: cmd, MemoryBytes: testMemory, CPUs: 1})
	if err != nil {
		b.t.Fatalf("run %s: %v", name, err)
	}
	return vm
}

func (b *bench) clone(req api.CloneRequest) []api.VM {
	b.t.Helper()
	vms, err := b.c.Clone(b.t.Context(), req, nil)
	if err != nil {
		b.t.Fatalf("clone: %v", err)
	}
	return vms
}

func (b *bench) snapshot(vm, name string) api.SnapshotResult {
	b.t.Helper()
	res, err := b.c.Snapshot(b.t.Context(), api.SnapshotRequest{VM: vm, Name: name})
	if err != nil {
		b.t.Fatalf("snapshot: %v", err)
	}
	return res
}

// clean fails when anything but these VMs is left: records, sockets, VMMs, page
// servers, half-made snapshots.
func (b *bench) clean(vms ...api.VM) {
	b.t.Helper()
	want := map[string]bool{}
	for _, v := range vms {
		want[v.ID] = true
	}
	for _, id := range sorted(b.t, b.layout.VMs()) {
		if !want[id] {
			b.t.Errorf("record of VM %s is left", id)
		}
	}
	for _, name := range sorted(b.t, b.layout.Runtime) {
		if serving := len(b.servers.running()) > 0 && name[:3] == "ps-"; !want[name] && !serving && name != "api.sock" && name != "serve.lock" {
			b.t.Errorf("%s is left in the runtime directory", name)
		}
	}
	for _, v := range b.engine.running() {
		if !want[v.place.ID] {
			b.t.Errorf("VM %s is left", v.place.ID)
		}
		if v.isPaused() {
			b.t.Errorf("VM %s is left paused", v.place.ID)
		}
	}
	for _, name := range sorted(b.t, b.layout.Snapshots()) {
		if name[0] == '.' {
			b.t.Errorf("%s is left of a snapshot", name)
		}
	}
	list, err := b.c.List(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	for _, v := range list {
		if !want[v.ID] {
			b.t.Errorf("VM %s is still listed as %s", v.Name, v.State)
		}
	}
}

// wantCode fails unless err is an *api.Error of this code.
func wantCode(t testing.TB, err error, code api.Code) {
	t.Helper()
	_ = apiError(t, err, code)
}

// apiError returns err as an *api.Error, which has to be of this code.
func apiError(t testing.TB, err error, code api.Code) *api.Error {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) {
		t.Fatalf("error is %v, want one of code %s", err, code)
	}
	if e.Code != code {
		t.Fatalf("code is %s, want %s: %s", e.Code, code, e.Message)
	}
	return e
}

// logs reads a log to its end: text per stream, and the exit code or -1.
func (b *bench) logs(name string, req api.LogsRequest) (out string, code int) {
	b.t.Helper()
	r, err := b.c.Logs(b.t.Context(), name, req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer r.Close()
	return readLog(b.t, r)
}

// fakeImages has one image, under any name but "nosuch".
type fakeImages struct {
	dir string
	cfg v1.Config
}

func (f *fakeImages) Get(ref string) (*image.Image, error) {
	if ref == "nosuch" {
		return nil, fmt.Errorf("%s: %w", ref, image.ErrUnknown)
	}
	return &image.Image{ID: "sha256:img", RootFS: filepath.Join(f.dir, "rootfs"), Config: v1.ConfigFile{Config: f.cfg}}, nil
}

func (f *fakeImages) path() string { return filepath.Join(f.dir, "image-lease") }

func (f *fakeImages) Lease(string) (*os.File, error) {
	l, err := os.OpenFile(f.path(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	return l, unix.Flock(int(l.Fd()), unix.LOCK_SH)
}

// leased says whether anybody holds a lease.
func (f *fakeImages) leased(t testing.TB) bool {
	t.Helper()
	l, err := os.OpenFile(f.path(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	return len(p), nil
}

var _ io.Writer = testLog{}
