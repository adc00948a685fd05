//go:build linux

package pageserver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/pagesum"
	"fcvm/internal/workingset"
)

// withSet stores a working set of the pages, and has c use it.
func withSet(t *testing.T, c *Config, pages ...int64) *workingset.Set {
	t.Helper()
	c.ID = workingset.ID{1}
	c.WorkingSet = filepath.Join(t.TempDir(), "workingset")
	set := workingset.New(c.ID, testPages)
	for _, p := range pages {
		set.Add(p)
	}
	if err := os.WriteFile(c.WorkingSet, set.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
	return set
}

func loadSet(t *testing.T, c Config) *workingset.Set {
	t.Helper()
	raw, err := os.ReadFile(c.WorkingSet)
	if err != nil {
		t.Fatal(err)
	}
	set, err := workingset.Parse(raw, c.ID, testPages)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// What is in the working set is there before it is asked for.
func TestReplay(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		c := testConfig(t, p)
		pages := []int64{1, 2, 3, 4, 5, 40, 100, 101, 250}
		withSet(t, &c, pages...)
		f := serve(t, c)
		m := f.clone(t)
		// One page of zeros in the set stands for all in its region, which is in one block.
		want, zeros := uint64(0), map[int]bool{}
		for _, page := range pages {
			if isHole(int(page)) {
				zeros[int(page)/(testPages/2)] = true
			} else if p == PolicyCopy { // what a template gives needs no placing
				want += pageSize
			}
		}
		if len(zeros) == 0 {
			t.Fatal("no page of the set is zeros")
		}
		for page := range testPages {
			if isHole(page) && zeros[page/(testPages/2)] {
				want += pageSize
			}
		}
		eventually(t, func() ([]SessionStats, bool) {
			st := f.Stats().Sessions
			return st, len(st) == 1 && st[0].ReplayedBytes == want
		})
		if p == PolicyShare {
			eventually(t, func() (int64, bool) { n := f.Stats().ReplayedBytes; return n, n > 0 })
		}
		for _, page := range pages {
			m.hasSnapshot(t, int(page))
		}
		if st := f.sessions(t, 1)[0]; st.Faults != 0 {
			t.Errorf("%d faults, want none", st.Faults)
		}
		m.hasSnapshot(t, 200)
		if st := f.sessions(t, 1)[0]; st.Faults != 1 {
			t.Errorf("%d faults, want one", st.Faults)
		}
	})
}

// A page that the guest gave back before it was replayed stays zeros, and one that it
// wrote stays as it is.
func TestReplayLeavesTheGuestAlone(t *testing.T) {
	c := testConfig(t, PolicyCopy)
	f := serve(t, c)
	m := f.clone(t)
	f.sessions(t, 1)
	m.write(t, 10)
	m.discard(t, 11, 1)
	m.hasZeros(t, 11)
	m.discard(t, 20, 1)
	var ses *session
	f.mu.Lock()
	for ses = range f.Server.sessions {
	}
	f.mu.Unlock()
	for _, page := range []int64{9, 10, 11, 20, 21} {
		f.workingSet.add(page)
	}
	f.ahead.begin(ses)
	eventually(t, func() (SessionStats, bool) {
		st := f.Stats().Sessions[0]
		return st, st.ReplayedBytes == 2*pageSize
	})
	m.hasSnapshot(t, 9)
	m.hasOwn(t, 10)
	m.hasZeros(t, 11)
	m.hasZeros(t, 20)
	m.hasSnapshot(t, 21)
}

// The pages that a clone waited for are stored beside the snapshot, with the
// number of faults, and tell how much they help the next one.
func TestRecording(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		c := testConfig(t, p)
		c.ID, c.WorkingSet = workingset.ID{9}, filepath.Join(t.TempDir(), "workingset")
		touch := []int{3, 7, 60, 200}
		for round := range 2 {
			if p == PolicyShare {
				c.Template = memfd(t)
			}
			f := serve(t, c)
			m := f.clone(t)
			for _, page := range touch {
				m.hasSnapshot(t, page)
			}
			if err := f.end(); err != nil {
				t.Fatal(err)
			}
			set := loadSet(t, c)
			for _, page := range touch {
				if !set.Has(int64(page)) {
					t.Errorf("round %d: page %d is missing", round, page)
				}
			}
			if set.Count() != int64(len(touch)) {
				t.Errorf("round %d: %d pages", round, set.Count())
			}
			if set.Cold != (workingset.Tally{Sessions: 1, Faults: 4}) {
				t.Errorf("round %d: without the set %+v", round, set.Cold)
			}
			if round == 1 && set.Warm.Sessions != 1 {
				t.Errorf("with the set %+v", set.Warm)
			}
		}
	})
}

// Of a VMM that was started ahead is recorded what its guest waits for once it runs;
// one that never runs tells nothing.
func TestRecordingOfAVMMThatWaits(t *testing.T) {
	c := testConfig(t, PolicyCopy)
	c.ID, c.WorkingSet = workingset.ID{9}, filepath.Join(t.TempDir(), "workingset")
	f := serve(t, c)
	unused, ahead := f.clone(t), f.clone(t)
	f.sessions(t, 2)
	ctl, err := Dial(t.Context(), f.control)
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	for _, m := range []clone{unused, ahead} {
		m.hasSnapshot(t, 3) // its device state is loaded
		if err := ctl.Record(t.Context(), m.PID(), false); err != nil {
			t.Fatal(err)
		}
		m.hasSnapshot(t, 7) // nobody's
	}
	if err := ctl.Record(t.Context(), ahead.PID(), true); err != nil {
		t.Fatal(err)
	}
	ahead.hasSnapshot(t, 60)
	ahead.hasSnapshot(t, 200)
	if err := ctl.Record(t.Context(), 1, true); !errors.Is(err, ErrAnswered) {
		t.Errorf("record a VMM that is not served: %v", err)
	}
	if err := f.end(); err != nil {
		t.Fatal(err)
	}
	set := loadSet(t, c)
	if tell := set.Cold.Sessions + set.Warm.Sessions; tell != 1 || set.Cold.Faults+set.Warm.Faults != 2 {
		t.Errorf("without the set %+v, with it %+v, want one session with 2 faults", set.Cold, set.Warm)
	}
	if !set.Has(60) || !set.Has(200) || set.Has(7) {
		t.Errorf("%d pages, want those that the guest waited for", set.Count())
	}
}

// A set that is torn or another snapshot's is ignored, and replaced.
func TestBadWorkingSet(t *testing.T) {
	for name, spoil := range map[string]func(c *Config){
		"torn":               func(c *Config) { _ = os.Truncate(c.WorkingSet, 50) },
		"another snapshot's": func(c *Config) { c.ID[5]++ },
		"nonsense":           func(c *Config) { _ = os.WriteFile(c.WorkingSet, []byte(strings.Repeat("x", 5000)), 0o600) },
		"empty":              func(c *Config) { _ = os.Truncate(c.WorkingSet, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t, PolicyCopy)
			withSet(t, &c, 1, 2, 3)
			spoil(&c)
			f := serve(t, c)
			m := f.clone(t)
			m.hasSnapshot(t, 5)
			if st := f.Stats(); st.WorkingSetPages != 1 || st.Sessions[0].ReplayedBytes != 0 {
				t.Errorf("%d pages in the set, %d bytes replayed", st.WorkingSetPages, st.Sessions[0].ReplayedBytes)
			}
			if err := f.end(); err != nil {
				t.Fatal(err)
			}
			if set := loadSet(t, c); set.Count() != 1 || !set.Has(5) {
				t.Errorf("%d pages", set.Count())
			}
		})
	}
	// One that cannot be written to is used all the same.
	c := testConfig(t, PolicyCopy)
	c.WorkingSet = "/nonexistent/workingset"
	f := serve(t, c)
	f.clone(t).hasSnapshot(t, 5)
}

// In the background the template gets all there is, within its bound.
func TestBackgroundFill(t *testing.T) {
	for _, most := range []int64{0, 40 * pageSize} {
		c := testConfig(t, PolicyShare)
		c.Fill = Fill{BytesPerSecond: 1 << 30, MaxBytes: most}
		f := serve(t, c)
		want := int64(0)
		for page := range testPages {
			if !isHole(page) {
				want += pageSize
			}
		}
		if most > 0 {
			want = most
		}
		eventually(t, func() (int64, bool) { n := f.Stats().TemplateBytes; return n, n >= want })
		time.Sleep(50 * time.Millisecond) // what would be too much has time to come
		if st := f.Stats(); st.TemplateBytes < want || st.TemplateBytes > want+window || st.BackgroundBytes == 0 {
			t.Errorf("%d bytes in the template, %d from the background, want %d", st.TemplateBytes, st.BackgroundBytes, want)
		}
		if most == 0 {
			m := f.clone(t)
			for page := range testPages {
				m.hasSnapshot(t, page)
			}
			checkHoles(t, f.Server)
		}
	}
}

// sumFile makes the sums of a memory file.
func sumFile(t *testing.T, mem string) string {
	t.Helper()
	raw, err := os.ReadFile(mem)
	if err != nil {
		t.Fatal(err)
	}
	table := pagesum.New(testPages)
	for p := range int64(testPages) {
		table.Set(p, pagesum.Of(raw[p*pageSize:(p+1)*pageSize]))
	}
	path := filepath.Join(t.TempDir(), "mem.sums")
	if err := os.WriteFile(path, table.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A page that changed underneath ends the clone that needs it; all others are
// served as before.
func TestChangedPageKills(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		c := testConfig(t, p)
		c.PageSums = sumFile(t, c.MemFile)
		file, err := os.OpenFile(c.MemFile, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteAt([]byte{0xbd}, 200*pageSize+99); err != nil {
			t.Fatal(err)
		}
		f := serve(t, c)
		fine, m := f.clone(t), f.clone(t)
		f.sessions(t, 2)
		for page := range 160 {
			fine.hasSnapshot(t, page)
		}
		m.begin(pstest.Op{Kind: pstest.Read, Pages: pstest.Page(200)})
		m.killed(t)
		if fail := f.failure(t); fail.PID != m.PID() || !strings.Contains(fail.Reason, "at 0xc8000: its content changed") {
			t.Errorf("failure: %+v", fail)
		}
		fine.hasSnapshot(t, 190)
	})
}

// What is wrong for a moment only is read again.
func TestReadIsTriedAgain(t *testing.T) {
	c := testConfig(t, PolicyCopy)
	f, held := serveHeld(t, c)
	held.failing.Store(2)
	m := f.clone(t)
	m.hasSnapshot(t, 4)
	if st := f.Stats(); len(st.Failures) != 0 || st.Sessions[0].Slow != 1 {
		t.Errorf("%+v", st)
	}
}

// The template's source does not stay in the page cache.
func TestSourceIsDropped(t *testing.T) {
	c := testConfig(t, PolicyShare)
	var fs unix.Statfs_t
	if err := unix.Statfs(c.MemFile, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("the memory file is on tmpfs, which is nothing but page cache")
	}
	file, err := os.Open(c.MemFile)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Sync(); err != nil { // dirty pages stay
		t.Fatal(err)
	}
	f := serve(t, c)
	m := f.clone(t)
	for page := range testPages {
		m.hasSnapshot(t, page)
	}
	eventually(t, func() (uint64, bool) {
		var st unix.Cachestat_t
		err := unix.Cachestat(uint(file.Fd()), &unix.CachestatRange{Len: testPages * pageSize}, &st, 0)
		if errors.Is(err, unix.ENOSYS) {
			t.Skip("cachestat(2) needs Linux 6.5")
		}
		if err != nil {
			t.Fatal(err)
		}
		return st.Cache, st.Cache == 0
	})
}
