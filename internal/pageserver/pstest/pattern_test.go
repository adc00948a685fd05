//go:build linux

package pstest

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A word tells who wrote it, to which page.
func TestMarkOfWord(t *testing.T) {
	seen := make(map[uint64]mark)
	for _, m := range []mark{
		{0, 0, 1}, {0, 1, 1}, {1, 0, 1}, {1, 1, 1}, {1, 1, 2}, {4095, 1<<24 - 1, 1<<28 - 1}, {77, 123456, 7654321},
	} {
		for _, i := range []int{0, 1, 511} {
			w := m.word(i)
			if got := markOf(w, i); got != m {
				t.Errorf("word %d of %+v is taken for %+v", i, m, got)
			}
			if other, ok := seen[w]; ok {
				t.Errorf("%+v and %+v have a word in common", m, other)
			}
			seen[w] = m
		}
	}
}

// Whatever one word of a page is exchanged for, the check finds it, and tells what it is.
func TestCheckFindsEveryWord(t *testing.T) {
	own := mark{clone: 2, page: 9, version: 5}
	for _, c := range []struct {
		name   string
		fill   func([]byte)
		expect Expect
		want   string
	}{
		{"snapshot", func(b []byte) { SnapshotPage(b, 9) }, Expect{Snapshot: true}, "want the snapshot's page"},
		{"zero", func(b []byte) { clear(b) }, Expect{Zero: true, Snapshot: true}, "want the snapshot's page or zeros"},
		{"own", own.fill, Expect{Clone: 2, Version: 5, Zero: true}, "want zeros or page 9 as clone 2 wrote it (version 5)"},
	} {
		page := make([]byte, PageSize)
		c.fill(page)
		var o Outcome
		if o.check(page, 9, c.expect); len(o.Wrong) != 0 {
			t.Fatal(o.Wrong)
		}
		for i := range PageSize / 8 {
			c.fill(page)
			for with, text := range map[uint64]string{
				mark{3, 9, 1}.word(i):   "page 9 as clone 3 wrote it (version 1)",
				snapshotMark(8).word(i): "page 8 of the snapshot", 0x1234: "garbage (0x1234)",
			} {
				binary.NativeEndian.PutUint64(page[8*i:], with)
				o = Outcome{}
				o.check(page, 9, c.expect)
				if len(o.Wrong) != 1 || !strings.Contains(o.Wrong[0], text) || !strings.Contains(o.Wrong[0], c.want) {
					t.Fatalf("%s: word %d: %q, want %q", c.name, i, o.Wrong, text)
				}
			}
		}
	}
}

func TestSnapshotFile(t *testing.T) {
	const pages = 1024
	path := filepath.Join(t.TempDir(), "mem")
	if err := WriteSnapshot(path, pages); err != nil {
		t.Fatal(err)
	}
	mem, err := os.ReadFile(path)
	if err != nil || len(mem) != pages*PageSize {
		t.Fatal(len(mem), err)
	}
	var holes int
	for p := range pages {
		var o Outcome
		o.check(mem[p*PageSize:(p+1)*PageSize], p, Expect{Snapshot: true})
		if len(o.Wrong) != 0 {
			t.Fatal(o.Wrong)
		}
		holes += o.Zero
	}
	if holes == 0 || holes > pages/2 {
		t.Errorf("%d holes", holes)
	}
}
