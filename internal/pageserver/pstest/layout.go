//go:build linux

package pstest

// Owners of a page besides the numbers of threads.
const (
	// everybody only reads it.
	everybody = -1
	// contended is written to, and given back, by all.
	contended = -2
)

// layout says which thread of a history owns which page. Owners change every few
// pages, so that what a page server answers together (Linux maps 16 pages around a
// fault) belongs to several; and some own long runs, which they give back at once.
type layout struct {
	owner []int
	// blocks are what threads work on at the same time.
	blocks []run
	// unit is how many pages of 4096 bytes can only be given back together.
	unit int
}

type run struct{ first, count int }

// Sizes in pages of 4096 bytes. Regions are multiples of a block.
const (
	blockPages = 64
	pieces     = 4
)

func newLayout(m *memory, threads int, seed uint64) layout {
	l := layout{owner: make([]int, len(m.pages)), unit: m.pageSize / PageSize}
	block, piece := max(blockPages, l.unit), max(pieces, l.unit)
	for first := 0; first < len(m.pages); first += block {
		if m.pages[first] == nil {
			continue // a gap in the memory file
		}
		l.blocks = append(l.blocks, run{first, block})
		long := mix(seed^uint64(first))%4 == 0
		for i := 0; i < block; i += piece {
			owner := l.pick(seed+uint64(first+i), threads)
			if long {
				owner = int(mix(seed+uint64(first)) % uint64(threads))
			}
			for p := first + i; p < first+i+piece; p++ {
				l.owner[p] = owner
			}
		}
	}
	return l
}

func (l *layout) pick(seed uint64, threads int) int {
	switch x := mix(seed); x % 8 {
	case 0:
		return everybody
	case 1, 2:
		return contended
	default:
		return int(x >> 8 % uint64(threads))
	}
}

// alone is p and what can only be given back with it.
func (l *layout) alone(p int) (first, count int) { return p / l.unit * l.unit, l.unit }

// removable is the run around p, within its block, that has the same owner.
func (l *layout) removable(p int) (first, count int) {
	block := max(blockPages, l.unit)
	start := p / block * block
	first, end := p, p+1
	for first > start && l.owner[first-1] == l.owner[p] {
		first--
	}
	for end < start+block && l.owner[end] == l.owner[p] {
		end++
	}
	return first, end - first
}
