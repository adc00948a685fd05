package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/workingset"
)

// record writes a working set of these pages, as the page server does.
func record(t *testing.T, snap *Snapshot, pages ...int64) {
	t.Helper()
	id, err := snap.WorkingSetID()
	if err != nil {
		t.Fatal(err)
	}
	set := workingset.New(id, snap.pages())
	for _, p := range pages {
		set.Add(p)
	}
	if err := os.WriteFile(snap.WorkingSet(), set.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWorkingSetIsNoPartOfTheSnapshot(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1, 2)
	if _, err := snap.ReadWorkingSet(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before any clone: %v", err)
	}
	before := snap.DiskBytes()
	record(t, snap, 0, 7)
	if !snap.stamped() {
		t.Error("a working set makes the stamp void")
	}
	got, err := s.Get("base")
	if err != nil {
		t.Fatal(err)
	}
	if got.Sum != snap.Sum {
		t.Error("a working set changes the snapshot's sum")
	}
	if err := s.Verify(t.Context(), "base", nil); err != nil {
		t.Error(err)
	}
	set, err := got.ReadWorkingSet()
	if err != nil {
		t.Fatal(err)
	}
	if set.Count() != 2 || !set.Has(7) {
		t.Errorf("read %d pages", set.Count())
	}
	if n := got.DiskBytes(); n <= before {
		t.Errorf("with a working set it occupies %d bytes, without %d", n, before)
	}
	if err := s.Remove("base"); err != nil {
		t.Error(err)
	}
	if got := left(t, s); got != "" {
		t.Errorf("left %q", got)
	}
}

func TestUnusableWorkingSetHarmsNothing(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, s *Store, path string){
		"empty": func(t *testing.T, _ *Store, path string) {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		},
		"torn":    func(t *testing.T, _ *Store, path string) { write(t, path, 90, "half a bitmap") },
		"longer":  func(t *testing.T, _ *Store, path string) { write(t, path, 1<<20, "x") },
		"a pipe":  func(t *testing.T, _ *Store, path string) { os.Remove(path); _ = unix.Mkfifo(path, 0o600) },
		"a link":  func(t *testing.T, _ *Store, path string) { os.Remove(path); _ = os.Symlink("/dev/zero", path) },
		"a store": func(t *testing.T, _ *Store, path string) { os.Remove(path); _ = os.Mkdir(path, 0o700) },
		"of the snapshot that had the name before": func(t *testing.T, s *Store, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Remove("base"); err != nil {
				t.Fatal(err)
			}
			create(t, s, "base", 3, 4)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			snap := create(t, s, "base", 1, 2)
			record(t, snap, 1)
			harm(t, s, snap.WorkingSet())
			snap, err := s.Get("base")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := snap.ReadWorkingSet(); !errors.Is(err, workingset.ErrUnusable) {
				t.Errorf("read it: %v", err)
			}
			if err := s.Check(t.Context(), snap, nil); err != nil {
				t.Error(err)
			}
			if err := s.Verify(t.Context(), "base", nil); err != nil {
				t.Error(err)
			}
			if err := s.Remove("base"); err != nil {
				t.Error(err)
			}
		})
	}
}
