//go:build linux

package pageserver

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver/pstest"
)

func policies(t *testing.T, test func(t *testing.T, p Policy)) {
	for _, p := range []Policy{PolicyCopy, PolicyShare} {
		t.Run(string(p), func(t *testing.T) { test(t, p) })
	}
}

func TestServesContent(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		f := serve(t, testConfig(t, p))
		for range 3 {
			m := f.clone(t)
			// Writes first, so that each kind of page gets each kind of fault.
			var written, read []int
			for page := range testPages {
				if page%5 == 0 {
					written = append(written, page)
				} else {
					read = append(read, page)
				}
			}
			m.write(t, written...)
			m.hasOwn(t, written...)
			m.hasSnapshot(t, read...)
		}
		st := f.sessions(t, 3)
		t.Logf("template %d KiB, sessions %+v", f.Stats().TemplateBytes>>10, st)
		for _, s := range st {
			if s.Faults == 0 || s.PID == 0 {
				t.Errorf("session without faults or pid: %+v", s)
			}
		}
		if p == PolicyCopy {
			return
		}
		full := int64(0)
		for page := range testPages {
			if !isHole(page) {
				full += pageSize
			}
		}
		if got := f.Stats().TemplateBytes; got != full {
			t.Errorf("template holds %d bytes, want the %d that are not zero", got, full)
		}
	})
}

// One fault is enough for the pages around it, and for all clones.
func TestShareTakesFewFaults(t *testing.T) {
	f := serve(t, testConfig(t, PolicyShare))
	for range 2 {
		m := f.clone(t)
		for page := range 16 {
			if !isHole(page) {
				m.hasSnapshot(t, page)
			}
		}
	}
	// The first page was written when the server checked the template.
	total := uint64(0)
	for _, s := range f.sessions(t, 2) {
		total += s.Faults
	}
	if total != 1 {
		t.Errorf("%d faults, want 1", total)
	}
}

// A page of zeros brings the others of its block along, in its region, whether the
// snapshot has zeros there or the guest gave the page back.
func TestZerosComeTogether(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		f := serve(t, testConfig(t, p))
		m := f.clone(t)
		var holes []int
		for page := range testPages {
			if isHole(page) {
				holes = append(holes, page)
			}
		}
		faults := func() uint64 { return f.sessions(t, 1)[0].Faults }
		m.hasZeros(t, holes...)
		if got := faults(); got != 2 {
			t.Errorf("%d faults for the zeros of two regions, want 2", got)
		}
		m.hasSnapshot(t, span(0, testPages)...)
		if p == PolicyShare {
			return // what was given back is the template's again
		}
		m.write(t, 44)
		m.discard(t, 40, 4)
		before := faults()
		m.hasZeros(t, 41, 40, 43, 42)
		m.hasOwn(t, 44)
		if got := faults() - before; got != 1 {
			t.Errorf("%d faults for four pages that were given back, want 1", got)
		}
	})
}

func TestZerosAround(t *testing.T) {
	odd := func(page int64) bool { return page%2 == 1 }
	var got [][2]int64
	for first, n := range zerosAround(zeroBlock+5, 0, 10*zeroBlock, odd) {
		got = append(got, [2]int64{first, n})
	}
	// Not all of a block that is in pieces, but those that come next.
	if len(got) != zeroRuns || got[0] != [2]int64{zeroBlock + 5, 1} || got[1] != [2]int64{zeroBlock + 7, 1} {
		t.Errorf("got %d runs: %v", len(got), got)
	}
	got = nil
	all := func(int64) bool { return true }
	for first, n := range zerosAround(10, 4, 40, all) {
		got = append(got, [2]int64{first, n})
	}
	if want := [][2]int64{{10, 30}, {4, 6}}; !slices.Equal(got, want) {
		t.Errorf("within a region: got %v, want %v", got, want)
	}
}

// A VMM with anonymous memory is not helped by the template, and gets copies.
func TestShareWithAnonymousMemory(t *testing.T) {
	f := serve(t, testConfig(t, PolicyShare))
	f.cloneOf(t, pstest.Anonymous).hasSnapshot(t, span(0, testPages)...)
}

func TestTemplateFillsOnce(t *testing.T) {
	c := testConfig(t, PolicyShare)
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	counted := &countingFile{ReaderAtCloser: s.source.file}
	s.source.file = counted
	defer func() { _ = s.Close() }()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			buf := make([]byte, window)
			for page := range int64(testPages) {
				if _, err := s.template.need(page*pageSize, buf, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := counted.reads.Load(); got > testPages/16 {
		t.Errorf("%d reads for %d windows", got, testPages/16)
	}
	got, err := io.ReadAll(io.NewSectionReader(c.Template, 0, testPages*pageSize))
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, pageSize)
	for page := range testPages {
		pstest.SnapshotPage(want, page)
		if !bytes.Equal(got[page*pageSize:(page+1)*pageSize], want) {
			t.Errorf("page %d of the template is wrong", page)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(c.Template.Fd()), &st); err != nil || st.Blocks*512 != s.template.bytes.Load() {
		t.Errorf("template takes %d bytes, %d were filled: holes were lost (%v)", st.Blocks*512, s.template.bytes.Load(), err)
	}
}

// ReaderAtCloser is what a source reads from.
type ReaderAtCloser interface {
	io.ReaderAt
	io.Closer
}

type countingFile struct {
	ReaderAtCloser
	reads atomic.Int64
}

func (c *countingFile) ReadAt(b []byte, off int64) (int, error) {
	c.reads.Add(1)
	return c.ReaderAtCloser.ReadAt(b, off)
}

func TestRemovedPagesAreZeros(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		f := serve(t, testConfig(t, p))
		m := f.clone(t)
		m.discard(t, 16, 20) // before anybody touched them
		m.hasZeros(t, span(16, 36)...)
		m.write(t, 16)
		m.discard(t, 16, 1)
		m.hasZeros(t, 16)
		m.hasSnapshot(t, 15)
		if p == PolicyCopy {
			m.discard(t, 15, 1)
			m.hasZeros(t, 15)
		}
		// Another clone gave nothing back.
		f.clone(t).hasSnapshot(t, 16)
		if got := f.Stats().Sessions; got[0].RemovedBytes+got[1].RemovedBytes < 21*pageSize {
			t.Errorf("removed bytes of %+v", got)
		}
	})
}

// heldFile lets reads of the memory file wait, from hold until letGo.
type heldFile struct {
	ReaderAtCloser
	// failing is how many reads fail.
	failing atomic.Int32
	holding atomic.Bool
	reading chan struct{} // one is waiting
	goOn    chan struct{}
	letGo   func()
}

func (h *heldFile) ReadAt(b []byte, off int64) (int, error) {
	if h.failing.Add(-1) >= 0 {
		return 0, unix.EIO
	}
	if h.holding.Load() {
		select {
		case h.reading <- struct{}{}:
		default:
		}
		<-h.goOn
	}
	return h.ReaderAtCloser.ReadAt(b, off)
}

// serveHeld serves a file whose reads can be held.
func serveHeld(t testing.TB, c Config) (*fixture, *heldFile) {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	h := &heldFile{ReaderAtCloser: s.source.file, reading: make(chan struct{}, 1), goOn: make(chan struct{})}
	h.letGo = sync.OnceFunc(func() { h.holding.Store(false); close(h.goOn) })
	s.source.file, s.source.fd = h, -1
	f := serveWith(t, s)
	t.Cleanup(h.letGo)
	return f, h
}

// A page that is given back while it is read is zeros, although its content
// arrives afterwards; and giving back does not wait for the read.
func TestRemoveDuringRead(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		f, held := serveHeld(t, testConfig(t, p))
		m := f.clone(t)
		held.holding.Store(true)
		const page = 21
		// The template has it by the end, and the kernel maps that: also legal for a
		// page that the guest gave up.
		allowed := pstest.Expect{Zero: true, Snapshot: p == PolicyShare}
		got := m.begin(pstest.Op{Kind: pstest.Check, Pages: pstest.Page(page), Expect: allowed})
		<-held.reading
		m.discard(t, page, 1) // returns, with the read still under way
		held.letGo()
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
}

// What cannot be read ends the VMM, with the reason, and nobody else.
func TestTruncatedFileKills(t *testing.T) {
	policies(t, func(t *testing.T, p Policy) {
		c := testConfig(t, p)
		f := serve(t, c)
		fine, m := f.clone(t), f.clone(t)
		f.sessions(t, 2)
		fine.hasSnapshot(t, 0)
		if err := os.Truncate(c.MemFile, 32*pageSize); err != nil {
			t.Fatal(err)
		}
		m.begin(pstest.Op{Kind: pstest.Read, Pages: pstest.Page(200)})
		m.killed(t)
		fail := f.failure(t)
		if fail.PID != m.PID() || !strings.Contains(fail.Reason, "memory file: it ends at") {
			t.Errorf("failure: %+v", fail)
		}
		f.sessions(t, 1)
		fine.hasSnapshot(t, 30)
	})
}

// A session ends with its VMM, however many copies of the connection are left.
func TestSessionEndsWithVMM(t *testing.T) {
	f := serve(t, testConfig(t, PolicyCopy))
	m := f.vmm(t, pstest.Config{Shape: pstest.Anonymous, Regions: halves(guestSize)})
	// As of a VMM that was attached to: the connection is not its own.
	f.handOver(t, m)
	f.sessions(t, 1)
	m.Kill()
	f.sessions(t, 0)
	if st := f.Stats(); st.Ended != 1 || len(st.Failures) != 0 {
		t.Errorf("%+v", st)
	}
}

// The page server must not end a VMM that closed the connection (Firecracker before 1.12).
func TestConnectionMayEnd(t *testing.T) {
	f := serve(t, testConfig(t, PolicyCopy))
	m := f.clone(t)
	f.sessions(t, 1)
	if err := m.Disconnect(); err != nil {
		t.Fatal(err)
	}
	m.hasSnapshot(t, 1)
}

func TestTemplateIsChecked(t *testing.T) {
	c := testConfig(t, PolicyShare)
	disk, err := os.Create(c.MemFile + ".template")
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	used, short := memfd(t), memfd(t)
	if _, err := used.WriteAt([]byte{1}, 5*pageSize); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(used.Truncate(testPages*pageSize), short.Truncate(pageSize)); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		file *os.File
		want string
	}{{disk, "not on tmpfs"}, {used, "not empty"}, {short, "has 4096 bytes"}, {nil, "needs a template"}} {
		if x.file == disk {
			var st unix.Statfs_t
			if err := unix.Fstatfs(int(disk.Fd()), &st); err == nil && st.Type == unix.TMPFS_MAGIC {
				continue // the temporary directory is tmpfs itself
			}
		}
		c.Template = x.file
		if s, err := New(c); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("got %v, want %q", err, x.want)
			if s != nil {
				_ = s.Close()
			}
		}
	}
}
