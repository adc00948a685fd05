package memmap

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"reflect"
	"testing"
)

func newMap(pages int, states []Page) *Map {
	m := &Map{Title: "test", PageBytes: 4096, States: states, WorkingSet: true, Pages: make([]Page, pages)}
	for i := range m.Pages {
		m.Pages[i] = Zero
	}
	return m
}

// decoded draws the map and reads the PNG back, as who looks at it does.
func decoded(t *testing.T, m *Map) image.Image {
	t.Helper()
	if err := m.Check(); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.WritePNG(&b); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// square returns the first area of this colour, which has to be a square of side
// n. The pages are above the legend, which has the same colours.
func square(t *testing.T, img image.Image, c color.RGBA, n int) image.Point {
	t.Helper()
	is := func(x, y int) bool { return color.RGBAModel.Convert(img.At(x, y)) == c }
	b := img.Bounds()
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			if !is(x, y) {
				continue
			}
			for dy := range n + 1 {
				for dx := range n + 1 {
					if is(x+dx, y+dy) != (dx < n && dy < n) {
						t.Fatalf("colour %v at %d,%d is no square of side %d", c, x, y, n)
					}
				}
			}
			return image.Pt(x, y)
		}
	}
	t.Fatalf("nothing has colour %v", c)
	return image.Point{}
}

// TestPictureHasEachPageInItsPlace marks one page at a time and looks where it is.
func TestPictureHasEachPageInItsPlace(t *testing.T) {
	place := func(page int, mark Page) image.Point {
		m := newMap(16384, VMStates())
		m.Pages[page] = mark
		out, in := colours(mark.State())
		if mark&InWorkingSet != 0 {
			out = in
		}
		return square(t, decoded(t, m), out, 2)
	}
	origin := place(0, Private)
	for _, c := range []struct {
		page int
		mark Page
		want image.Point // in squares of 2 pixels; blocks are 64 squares and a gap of 1 apart
	}{
		// The curve begins like this, goes through the block, and ends at its upper right.
		{1, Private, image.Pt(1, 0)}, {2, Private, image.Pt(1, 1)}, {3, Private, image.Pt(0, 1)}, {4, Private, image.Pt(0, 2)},
		{1024, Private, image.Pt(0, 32)}, {2048, Private, image.Pt(32, 32)}, {4095, Private, image.Pt(63, 0)},
		// The next blocks stand to the right.
		{4096, Private, image.Pt(65, 0)}, {8192, Private, image.Pt(130, 0)}, {16383, Private, image.Pt(258, 0)},
		{1, Shared | InWorkingSet, image.Pt(1, 0)}, {1, Untouched | InWorkingSet, image.Pt(1, 0)}, {1, Shared, image.Pt(1, 0)},
	} {
		if got := place(c.page, c.mark).Sub(origin); got != c.want.Mul(2) {
			t.Errorf("page %d (%v) is at %v, want %v", c.page, c.mark, got, c.want.Mul(2))
		}
	}
}

func TestCurveKeepsNeighboursTogether(t *testing.T) {
	l := newLayout(2 * blockCells)
	seen := map[image.Point]bool{}
	for i := range blockCells {
		r := l.cell(i)
		if seen[r.Min] {
			t.Fatalf("square %d is where another one is", i)
		}
		seen[r.Min] = true
		if i == 0 {
			continue
		}
		d := r.Min.Sub(l.cell(i - 1).Min)
		if d.X*d.X+d.Y*d.Y != l.scale*l.scale {
			t.Fatalf("square %d is %v from the one before", i, d)
		}
	}
}

func TestPictureFitsTheScreen(t *testing.T) {
	for pages, want := range map[int]struct{ per, scale, columns, rows int }{
		0:               {1, 2, 1, 0},
		1:               {1, 2, 1, 1},
		32768:           {1, 2, 8, 1},  // 128 MiB
		262144:          {1, 2, 8, 8},  // 1 GiB
		262145:          {1, 1, 16, 5}, // a page more
		1 << 20:         {1, 1, 16, 16},
		1<<20 + 1:       {2, 1, 16, 9},
		1 << 22:         {4, 1, 16, 16}, // 16 GiB
		3 * (1 << 20):   {4, 1, 16, 12},
		maxPagesOfATest: {64, 1, 16, 16},
	} {
		l := newLayout(pages)
		if l.per != want.per || l.scale != want.scale || l.columns != want.columns || l.rows() != want.rows {
			t.Errorf("%d pages: %d a square of %d pixels, %d × %d blocks; want %+v", pages, l.per, l.scale, l.columns, l.rows(), want)
		}
		if s := l.size(); s.X > 1056 || s.Y > 1056 {
			t.Errorf("%d pages: %v pixels", pages, s)
		}
		if n := l.cells(); n > 0 && (l.sample(n-1) >= pages || l.sample(0) >= pages) {
			t.Errorf("%d pages: the last square shows page %d", pages, l.sample(n-1))
		}
	}
}

const maxPagesOfATest = 1 << 26 // 256 GiB

// TestSampleKeepsProportions has memory with a pattern that a fixed choice among
// the pages of a square would always miss, or always hit.
func TestSampleKeepsProportions(t *testing.T) {
	l := newLayout(1 << 22)
	hit := 0
	for i := range l.cells() {
		if l.sample(i)%4 == 0 {
			hit++
		}
	}
	if share := float64(hit) / float64(l.cells()); share < 0.24 || share > 0.26 {
		t.Errorf("every fourth page has %.3f of the picture", share)
	}
}

func TestCounts(t *testing.T) {
	m := newMap(10, VMStates())
	copy(m.Pages, []Page{Untouched, Shared, Shared | InWorkingSet, Private | InWorkingSet, Untouched | InWorkingSet})
	want := []Count{{Shared, 2, 1}, {Private, 1, 1}, {Zero, 5, 0}, {Untouched, 2, 1}}
	if got := m.Counts(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestPictureOfNothing(t *testing.T) {
	m := newMap(0, SnapshotStates())
	if b := decoded(t, m).Bounds(); b.Empty() {
		t.Errorf("bounds are %v", b)
	}
	if got := m.Counts(); got[0].Pages != 0 {
		t.Errorf("got %v", got)
	}
}

func TestCheckRefuses(t *testing.T) {
	for name, edit := range map[string]func(*Map){
		"a VM's state in a snapshot": func(m *Map) { m.Pages[3] = Shared },
		"no state":                   func(m *Map) { m.Pages[3] = 0x42 },
		"a working set unknown":      func(m *Map) { m.WorkingSet = false; m.Pages[3] |= InWorkingSet },
		"an unknown state":           func(m *Map) { m.States = append(m.States, 0x20) },
		"no page size":               func(m *Map) { m.PageBytes = 0 },
	} {
		m := newMap(10, SnapshotStates())
		if err := m.Check(); err != nil {
			t.Fatal(err)
		}
		edit(m)
		if err := m.Check(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// FuzzMap holds to this: what Check takes can be drawn and counted, and each page
// is counted once.
func FuzzMap(f *testing.F) {
	f.Add([]byte{0, 1, 3, 4, 0x83}, true)
	f.Add([]byte{2}, false)
	f.Fuzz(func(t *testing.T, pages []byte, workingSet bool) {
		m := &Map{Title: string(pages), PageBytes: 4096, States: VMStates(), WorkingSet: workingSet}
		for _, p := range pages {
			m.Pages = append(m.Pages, Page(p))
		}
		if m.Check() != nil {
			return
		}
		total := int64(0)
		for _, c := range m.Counts() {
			total += c.Pages
		}
		if total != int64(len(pages)) {
			t.Errorf("%d of %d pages are counted", total, len(pages))
		}
		if err := m.WritePNG(&bytes.Buffer{}); err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkPicture(b *testing.B) {
	for _, mib := range []int{512, 16384} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			m := newMap(mib*256, VMStates())
			for i := range m.Pages {
				m.Pages[i] = VMStates()[i/37%4]
			}
			for b.Loop() {
				if err := m.WritePNG(&bytes.Buffer{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
