package vmmtest

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// What a clone's snapshot holds is what the engine itself writes at the same pause,
// though fcvm reads only what the clone holds privately.
func (l *lab) testSameMemory(t *testing.T, b backend) {
	clone := l.restore(t, l.memory(t, b, l.snapshot), l.snapshot)
	const given = 64 << 20
	all := clone.total(t)
	if err := clone.Balloon(within(t), memoryBytes-given); err != nil {
		t.Fatal(err)
	}
	clone.awaitTotal(t, func(now int) bool { return now <= all-given>>10 })
	clone.want(t, "write 700", "ok")
	clone.want(t, "churn 4", "ok")
	dir := filepath.Join(l.dir, "same-"+b.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := clone.take(t, dir, l.snapshot.mem)
	l.sameMemory(t, clone, s.mem, l.snapshot.mem)
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
}

// sameMemory compares the memory file mem of s, which has been paused since it was
// written, with what the engine writes. Two kinds of pages may differ. What s gave back
// (balloon, free page reporting) the engine writes as zeros, and fcvm leaves as in the
// parent: the guest may expect neither. And the engine resets the guest's vsock whenever it
// saves its devices, and writes an event of that to the guest's memory.
func (l *lab) sameMemory(t *testing.T, s *started, mem, parent string) {
	own := filepath.Join(t.TempDir(), "own")
	if err := l.dumper(within(t), s.VM, own+".state", own); err != nil {
		t.Fatal(err)
	}
	c := compare(t, mem, own, parent)
	const ofVsock = 4 // the queue's parts, and a buffer; 1 page was seen
	if len(c.other) > ofVsock {
		t.Errorf("%d pages are not as the engine wrote them, the first are %d", len(c.other), c.other[:ofVsock])
	}
	if parent == "" && c.givenBack > 0 {
		t.Errorf("%d pages count as given back, though there is no parent", c.givenBack)
	}
	t.Logf("of %d pages, %d are as in the parent and were given back, and %d differ otherwise", c.pages, c.givenBack, len(c.other))
}

// comparison counts pages.
type comparison struct {
	pages     int
	givenBack int   // the engine's is zero, and ours the parent's
	other     []int // the pages that differ otherwise
}

// compare goes through the memory files of fcvm, the engine, and the parent, if any.
func compare(t *testing.T, ours, engines, parent string) (c comparison) {
	t.Helper()
	const pageSize = 4096
	var in []*bufio.Reader
	for _, name := range []string{ours, engines, parent} {
		if name == "" {
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		in = append(in, bufio.NewReaderSize(f, 1<<20))
	}
	var zero [pageSize]byte
	var pages [3][pageSize]byte
	for ; ; c.pages++ {
		ended := 0
		for i, r := range in {
			switch _, err := io.ReadFull(r, pages[i][:]); err {
			case nil:
			case io.EOF:
				ended++
			default:
				t.Fatalf("page %d: %v", c.pages, err)
			}
		}
		switch {
		case ended == len(in):
			return c
		case ended > 0:
			t.Fatalf("the files are not equally long: %d of them end before page %d", ended, c.pages)
		case pages[0] == pages[1]:
		case parent != "" && pages[1] == zero && pages[0] == pages[2]:
			c.givenBack++
		default:
			c.other = append(c.other, c.pages)
		}
	}
}
