package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const testMemory = 4 << 20

func testManifest() Manifest {
	return Manifest{
		VM:        "golden",
		Image:     Image{Ref: "nginx:latest", ID: "sha256:abc"},
		Engine:    Engine{Name: "qemu", Version: "7.2.22", Accel: "tcg", CPU: "max"},
		Machine:   Machine{MemoryBytes: testMemory, CPUs: 1},
		Guest:     Guest{KernelVersion: "6.1.0", KernelDigest: "sha256:k", InitrdDigest: "sha256:i"},
		Regions:   []MemRegion{{Offset: 0, Size: 1 << 20}, {Offset: 1 << 20, Size: 3 << 20}},
		Container: Container{Command: []string{"nginx", "-g", "daemon off;"}, Env: []string{"A=\xff"}},
	}
}

// fill writes a memory file with a page of each of these bytes, and a state.
func fill(pages ...byte) func(context.Context, *Draft) (Manifest, error) {
	return func(ctx context.Context, d *Draft) (Manifest, error) {
		mem, err := d.CreateMemory(ctx, testMemory, nil)
		if err != nil {
			return Manifest{}, err
		}
		for i, b := range pages {
			page := make([]byte, pageSize)
			for j := range page {
				page[j] = b
			}
			if _, err := mem.WriteAt(page, int64(i)*pageSize); err != nil {
				return Manifest{}, err
			}
		}
		return testManifest(), os.WriteFile(d.StatePath(), []byte("device state"), 0o600)
	}
}

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func create(t *testing.T, s *Store, name string, pages ...byte) *Snapshot {
	t.Helper()
	snap, err := s.Create(t.Context(), name, fill(pages...))
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// left lists what is in the store, hidden entries included.
func left(t *testing.T, s *Store) string {
	t.Helper()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func wantErr(t *testing.T, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("got error %v, want one that is %v", err, sentinel)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

func TestCreateAndGet(t *testing.T) {
	s := open(t)
	made := create(t, s, "base", 1, 0, 2)
	got, err := s.Get("base")
	if err != nil {
		t.Fatal(err)
	}
	if got.Sum == "" || got.Sum != made.Sum || got.Name != "base" || got.Image.Ref != "nginx:latest" {
		t.Errorf("got manifest %+v, made %+v", got.Manifest, made.Manifest)
	}
	if got.Memory() != filepath.Join(s.dir, "base", "mem.img") || made.Memory() != got.Memory() {
		t.Errorf("memory is at %s and %s", got.Memory(), made.Memory())
	}
	if err := s.Verify(t.Context(), "base", nil); err != nil {
		t.Error(err)
	}
	if got := left(t, s); got != "base" {
		t.Errorf("store holds %q", got)
	}
	list, err := s.List()
	if err != nil || len(list) != 1 || list[0].Err != nil || list[0].Snapshot.Name != "base" {
		t.Errorf("List: %+v, %v", list, err)
	}
	if n := got.DiskBytes(); n <= 0 || n >= testMemory {
		t.Errorf("occupies %d bytes", n)
	}
}

func TestHolesDoNotChangeTheSum(t *testing.T) {
	s := open(t)
	a := create(t, s, "a", 1, 0, 2)
	b := create(t, s, "b", 1)
	c, err := s.Create(t.Context(), "c", func(ctx context.Context, d *Draft) (Manifest, error) {
		m, err := fill(1)(ctx, d)
		if err != nil {
			return m, err
		}
		page := make([]byte, pageSize)
		for j := range page {
			page[j] = 2
		}
		if _, err := d.mem.WriteAt(page, 2*pageSize); err != nil {
			return m, err
		}
		_, err = d.mem.WriteAt(make([]byte, 64*pageSize), 64*pageSize)
		return m, err
	})
	if err != nil {
		t.Fatal(err)
	}
	if a.Files[0].Sum != c.Files[0].Sum {
		t.Error("explicit zeros change the sum")
	}
	if a.Files[0].Sum == b.Files[0].Sum {
		t.Error("a page does not change the sum")
	}
	// The same page at another place is another memory.
	if d := create(t, s, "d", 1, 2); d.Files[0].Sum == a.Files[0].Sum {
		t.Error("the place of a page does not change the sum")
	}
}

func TestNames(t *testing.T) {
	s := open(t)
	for _, name := range []string{"", ".", "..", "a/b", "-x", ".x", "a b", "ü", strings.Repeat("a", 129), "x\x00"} {
		if _, err := s.Create(t.Context(), name, fill()); !errors.Is(err, ErrName) {
			t.Errorf("Create(%q): %v", name, err)
		}
		if _, err := s.Get(name); !errors.Is(err, ErrName) {
			t.Errorf("Get(%q): %v", name, err)
		}
		if err := s.Remove(name); !errors.Is(err, ErrName) {
			t.Errorf("Remove(%q): %v", name, err)
		}
		if _, err := s.Lease(name); !errors.Is(err, ErrName) {
			t.Errorf("Lease(%q): %v", name, err)
		}
	}
}

func TestUnknownNamesANearOne(t *testing.T) {
	s := open(t)
	create(t, s, "nginx-base")
	_, err := s.Get("ngnix-base")
	wantErr(t, err, ErrNotFound, "did you mean nginx-base?")
	_, err = s.Lease("ngnix-base")
	wantErr(t, err, ErrNotFound, "did you mean nginx-base?")
	err = s.Remove("postgres")
	wantErr(t, err, ErrNotFound, "postgres")
	if strings.Contains(err.Error(), "did you mean") {
		t.Errorf("%q is far from nginx-base", err)
	}
}

func TestCreateTakenName(t *testing.T) {
	s := open(t)
	create(t, s, "base", 1)
	_, err := s.Create(t.Context(), "base", func(context.Context, *Draft) (Manifest, error) {
		t.Error("fill was called for a name that is taken")
		return Manifest{}, nil
	})
	wantErr(t, err, ErrExists, "base")
	if err := s.Verify(t.Context(), "base", nil); err != nil {
		t.Errorf("the first was harmed: %v", err)
	}
}

func TestTwoCreationsAtOnce(t *testing.T) {
	s := open(t)
	_, err := s.Create(t.Context(), "base", func(ctx context.Context, d *Draft) (Manifest, error) {
		// Another process opens the store, which sweeps, and wants the same name.
		other, err := Open(s.dir)
		if err != nil {
			t.Fatal(err)
		}
		_, err = other.Create(ctx, "base", fill(9))
		wantErr(t, err, ErrExists, "being created")
		return fill(1)(ctx, d)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), "base", nil); err != nil {
		t.Error(err)
	}
}

func TestFailedCreationLeavesNothing(t *testing.T) {
	s := open(t)
	boom := errors.New("boom")
	cases := map[string]func(context.Context, *Draft) (Manifest, error){
		"failed": func(ctx context.Context, d *Draft) (Manifest, error) {
			if _, err := fill(1)(ctx, d); err != nil {
				t.Error(err)
			}
			return Manifest{}, boom
		},
		"no-state": func(ctx context.Context, d *Draft) (Manifest, error) {
			_, err := d.CreateMemory(ctx, testMemory, nil)
			return testManifest(), err
		},
		"no-memory": func(context.Context, *Draft) (Manifest, error) { return testManifest(), nil },
		"bad-manifest": func(ctx context.Context, d *Draft) (Manifest, error) {
			m, err := fill(1)(ctx, d)
			m.Machine.MemoryBytes++
			return m, err
		},
	}
	for name, f := range cases {
		if _, err := s.Create(t.Context(), name, f); err == nil {
			t.Errorf("%s: no error", name)
		} else if name == "failed" && !errors.Is(err, boom) {
			t.Errorf("%s: %v", name, err)
		}
		if got := left(t, s); got != "" {
			t.Errorf("%s: left %q", name, got)
		}
		// The name is free again.
		create(t, s, name, 1)
		if err := s.Remove(name); err != nil {
			t.Error(err)
		}
	}
}

func TestCancelledCreationLeavesNothing(t *testing.T) {
	s := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Create(ctx, "base", func(ctx context.Context, d *Draft) (Manifest, error) {
		m, err := fill(1)(ctx, d)
		cancel()
		return m, err
	})
	wantErr(t, err, context.Canceled)
	if got := left(t, s); got != "" {
		t.Errorf("left %q", got)
	}
}

func TestSnapshotOfAClone(t *testing.T) {
	s := open(t)
	parent := create(t, s, "parent", 1, 2, 3)
	child, err := s.Create(t.Context(), "child", func(ctx context.Context, d *Draft) (Manifest, error) {
		mem, err := d.CreateMemory(ctx, testMemory, parent)
		if err != nil {
			return Manifest{}, err
		}
		m := testManifest()
		m.Parent = parent.Name
		if _, err := mem.WriteAt([]byte{7}, pageSize); err != nil {
			return m, err
		}
		return m, os.WriteFile(d.StatePath(), []byte("x"), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	// It does not need its parent.
	if err := s.Remove("parent"); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), "child", nil); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(child.Memory())
	if err != nil {
		t.Fatal(err)
	}
	if got := []byte{b[0], b[pageSize], b[pageSize+1], b[2*pageSize], b[3*pageSize]}; string(got) != "\x01\x07\x02\x03\x00" {
		t.Errorf("memory is %v", got)
	}
}

func TestDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	pages := make([]byte, 512) // 2 MiB
	for i := range pages {
		pages[i] = byte(i%255 + 1)
	}
	_, err = s.Create(t.Context(), "base", fill(pages...))
	wantErr(t, err, ErrNoSpace, "base", "are free")
	if got := left(t, s); got != "" {
		t.Errorf("left %q", got)
	}
	_, err = s.Create(t.Context(), "base", func(_ context.Context, d *Draft) (Manifest, error) {
		return Manifest{}, d.Reserve(100 << 20)
	})
	wantErr(t, err, ErrNoSpace, "needs 100 MiB", "are free")
	create(t, s, "small", 1)
}
