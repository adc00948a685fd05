//go:build linux

package pstest

import (
	"fmt"
	"os"
)

const (
	// PageSize is that of the only architecture that fcvm runs on.
	PageSize = 4096
	// HugePageSize is the other page size that guest memory may have.
	HugePageSize = 2 << 20

	// step tells the words of a page from each other: what stands at the wrong
	// place of the right page is wrong.
	step = 0x9e3779b97f4a7c15
)

// mark says who wrote a page: each word of it is derived from its mark, so that a
// page is compared word by word without having its content at hand, and a word
// that is wrong tells where it comes from.
type mark struct {
	// clone is 0 for the snapshot.
	clone   uint16 // 12 bits
	page    uint32 // 24 bits, of 4096 bytes
	version uint32 // 28 bits
}

// The parts of a mark in an integer.
const (
	pageBits    = 24
	versionBits = 28
)

// first is word 0 of a page with this mark; word i is i steps further. The mixing
// can be undone (markOf), and makes neighbours look unlike each other. No mark
// gives 0, since the snapshot's version is 1 and that of a clone's write at least that.
func (m mark) first() uint64 {
	return mix(uint64(m.clone)<<(pageBits+versionBits) | uint64(m.page)<<versionBits | uint64(m.version))
}

// word is the one with number i.
func (m mark) word(i int) uint64 { return m.first() + uint64(i)*step }

// markOf tells whose word i of a page is, if it is anybody's.
func markOf(word uint64, i int) mark {
	x := unmix(word - uint64(i)*step)
	return mark{
		clone: uint16(x >> (pageBits + versionBits)),
		page:  uint32(x>>versionBits) & (1<<pageBits - 1), version: uint32(x) & (1<<versionBits - 1),
	}
}

// mix is its own inverse but for the order: a multiplication by an odd number and
// an exclusive or with the upper half can each be undone.
const (
	mixBy   = 0xd6e8feb86659fd93
	unmixBy = 0xcfee444d8b59a89b
)

func mix(x uint64) uint64 {
	x *= mixBy
	x ^= x >> 32
	return x * mixBy
}

func unmix(x uint64) uint64 {
	x *= unmixBy
	x ^= x >> 32
	return x * unmixBy
}

// snapshotMark is that of a page of 4096 bytes in the snapshot.
func snapshotMark(page int) mark { return mark{page: uint32(page), version: 1} }

// IsHole tells which pages of a snapshot that [WriteSnapshot] made are zeros: some
// alone, some runs of them, and one of 2 MiB in each 16 MiB.
func IsHole(page int) bool {
	return page%7 == 3 || page/24%5 == 4 || page/512%8 == 5
}

// fill writes the pattern of m over buf, from word 0 on.
func (m mark) fill(buf []byte) {
	w := m.first()
	for i := range len(buf) / 8 {
		*wordAt(buf, i) = w
		w += step
	}
}

// matches tells whether buf is what fill writes.
func (m mark) matches(buf []byte) bool { return !differs(buf, m.first(), step) }

// differs tells whether the words of buf are not first, first+by and so on. A page
// takes 0.3 µs.
func differs(buf []byte, first, by uint64) bool {
	for i := range len(buf) / 8 {
		if *wordAt(buf, i) != first {
			return true
		}
		first += by
	}
	return false
}

// SnapshotPage fills buf, of [PageSize] bytes, with what the snapshot has.
func SnapshotPage(buf []byte, page int) {
	if IsHole(page) {
		clear(buf)
		return
	}
	snapshotMark(page).fill(buf)
}

// WriteSnapshot makes a memory file of so many pages of 4096 bytes, in which every
// page is unlike every other, but for those that are holes ([IsHole]).
func WriteSnapshot(path string, pages int) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(int64(pages) * PageSize); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	buf := make([]byte, PageSize)
	for p := range pages {
		if IsHole(p) {
			continue
		}
		SnapshotPage(buf, p)
		if _, err := f.WriteAt(buf, int64(p)*PageSize); err != nil {
			return fmt.Errorf("write snapshot: %w", err)
		}
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	return nil
}
