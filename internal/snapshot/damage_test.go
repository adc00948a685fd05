package snapshot

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func write(t *testing.T, path string, at int64, b string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(b), at); err != nil {
		t.Fatal(err)
	}
}

func TestDamageSeenByGet(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(t *testing.T, dir string)
		word string
	}{
		"memory truncated": {func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, memoryFile), 1<<20); err != nil {
				t.Fatal(err)
			}
		}, "mem.img is truncated"},
		"memory missing": {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, memoryFile)) }, "mem.img is missing"},
		"sums missing":   {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, sumsFile)) }, "mem.sums is missing"},
		"sums longer":    {func(t *testing.T, dir string) { write(t, filepath.Join(dir, sumsFile), 1<<20, "x") }, "mem.sums was edited"},
		"state missing":  {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, stateFile)) }, "state.bin is missing"},
		"state longer": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, stateFile), 100, "x")
		}, "state.bin was edited"},
		"manifest missing": {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, manifestFile)) }, "manifest.json is missing"},
		"manifest edited": {func(t *testing.T, dir string) {
			p := filepath.Join(dir, manifestFile)
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			for i := range b {
				if string(b[i:i+6]) == "nginx:" {
					b[i] = 'N'
					break
				}
			}
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "the manifest was edited"},
		"directory renamed": {func(t *testing.T, dir string) {
			if err := os.Rename(dir, dir+"2"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(filepath.Dir(dir), "other"), dir); err != nil {
				t.Fatal(err)
			}
		}, "its manifest is that of other"},
		"memory is a link": {func(t *testing.T, dir string) {
			p := filepath.Join(dir, memoryFile)
			if err := os.Rename(p, p+"2"); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(p+"2", p); err != nil {
				t.Fatal(err)
			}
		}, "mem.img is not a file"},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			create(t, s, "other", 1)
			snap := create(t, s, "base", 1, 2)
			c.harm(t, snap.Dir)
			_, err := s.Get("base")
			wantErr(t, err, ErrDamaged, "base", c.word)
			wantErr(t, s.Verify(t.Context(), "base", nil), ErrDamaged, c.word)
			list, err := s.List()
			if err != nil {
				t.Fatal(err)
			}
			if last := list[len(list)-1]; last.Err == nil && name != "directory renamed" {
				t.Errorf("List shows no damage: %+v", list)
			}
			// Damaged or not, it can be removed.
			if err := s.Remove("base"); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDamageSeenByCheck(t *testing.T) {
	for file, at := range map[string]int64{memoryFile: pageSize + 5, stateFile: 3, sumsFile: 40} {
		t.Run(file, func(t *testing.T) {
			s := open(t)
			snap := create(t, s, "base", 1, 2)
			path := filepath.Join(snap.Dir, file)
			fi, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			write(t, path, at, "x")
			// An editor who sets the time back is seen as well, by ctime.
			if err := os.Chtimes(path, time.Time{}, fi.ModTime()); err != nil {
				t.Fatal(err)
			}
			got, err := s.Get("base")
			if err != nil {
				t.Fatal(err)
			}
			if got.stamped() {
				t.Error("the stamp vouches for an edited file")
			}
			wantErr(t, s.Check(t.Context(), got, nil), ErrDamaged, "the content of "+file+" changed")
			wantErr(t, s.Check(t.Context(), got, nil), ErrDamaged)
			wantErr(t, s.Verify(t.Context(), "base", nil), ErrDamaged, "the content of "+file+" changed")
		})
	}
}

func TestCheckReadsOnceAfterACopy(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1, 2)
	reads := func() int {
		n := 0
		if err := s.Check(t.Context(), snap, func(int64, int64) { n++ }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := reads(); n != 0 {
		t.Errorf("a new snapshot was read")
	}
	// A backup brought back has other inodes and times, and is whole.
	b, err := os.ReadFile(snap.Memory())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(snap.Memory()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(snap.Memory(), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if n := reads(); n == 0 {
		t.Error("a new file was believed unread")
	}
	if n := reads(); n != 0 {
		t.Error("a verified file was read again")
	}
}

func TestVerifyReadsAlthoughStamped(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1, 2)
	// A disk that loses bits changes no times: write, and stamp what was written.
	write(t, snap.Memory(), 0, "x")
	if err := snap.writeStamp(); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(t.Context(), snap, nil); err != nil {
		t.Fatalf("the test's stamp is not taken: %v", err)
	}
	wantErr(t, s.Verify(t.Context(), "base", nil), ErrDamaged, "mem.img changed")
}
