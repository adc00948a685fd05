// Package workingset is the format of a snapshot's working set: the pages that its
// first clones had to wait for, which later ones get before they ask.
//
// It lies beside the snapshot, and is written to in place, by the page server,
// after the snapshot was sealed: one that is torn, stale or of another snapshot
// is refused by [Parse], and costs speed only.
package workingset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"math/bits"
)

// The file: a magic number, the ID, the number of pages, four counters (two
// tallies), the bitmap in words of 64 pages, all integers little-endian of 64 bits, and a CRC32C of
// all that as a little-endian integer of 32 bits.
const (
	magic      = "fcvmwks1"
	idSize     = 32
	headerSize = len(magic) + idSize + 5*8
	sumSize    = 4
	// maxPages bounds what is believed: 1 TiB of guest memory.
	maxPages = 1 << 28
)

// ErrUnusable means that a file is no working set of this snapshot. Nothing is
// lost but speed.
var ErrUnusable = errors.New("working set is unusable")

// ID says which snapshot a working set belongs to: the SHA-256 in its manifest.
type ID [idSize]byte

// Tally counts the faults that clones waited for while they were recorded.
type Tally struct {
	Sessions, Faults uint64
}

// mean number of faults; 0 without sessions.
func (t Tally) mean() float64 {
	if t.Sessions == 0 {
		return 0
	}
	return float64(t.Faults) / float64(t.Sessions)
}

// Set is a working set. It is not safe for concurrent use.
type Set struct {
	id    ID
	pages int64
	words []uint64
	// Cold counts clones that got nothing before they asked, Warm those for which
	// the set was replayed.
	Cold, Warm Tally
}

// New returns an empty set for a memory of this many pages.
func New(id ID, pages int64) *Set {
	return &Set{id: id, pages: pages, words: make([]uint64, (pages+63)/64)}
}

// Parse reads a set. The error wraps [ErrUnusable] when it is torn, or not of this
// snapshot.
func Parse(b []byte, id ID, pages int64) (*Set, error) {
	if pages <= 0 || pages > maxPages {
		return nil, fmt.Errorf("%w: %d pages", ErrUnusable, pages)
	}
	s := New(id, pages)
	if len(b) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrUnusable)
	}
	if len(b) != FileSize(pages) || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: %d bytes are not a set of %d pages", ErrUnusable, len(b), pages)
	}
	body := b[:len(b)-sumSize]
	if binary.LittleEndian.Uint32(b[len(body):]) != sum(body) {
		return nil, fmt.Errorf("%w: its checksum does not match", ErrUnusable)
	}
	if ID(b[len(magic):len(magic)+idSize]) != id {
		return nil, fmt.Errorf("%w: it is of another snapshot", ErrUnusable)
	}
	field := func(i int) uint64 { return binary.LittleEndian.Uint64(body[len(magic)+idSize+8*i:]) }
	if field(0) != uint64(pages) {
		return nil, fmt.Errorf("%w: it is of %d pages", ErrUnusable, field(0))
	}
	s.Cold, s.Warm = Tally{field(1), field(2)}, Tally{field(3), field(4)}
	for i := range s.words {
		s.words[i] = binary.LittleEndian.Uint64(body[headerSize+8*i:])
	}
	if tail := pages % 64; tail != 0 && s.words[len(s.words)-1]>>tail != 0 {
		return nil, fmt.Errorf("%w: it has pages behind the end", ErrUnusable)
	}
	return s, nil
}

// FileSize is the size in bytes of a file for this many pages.
func FileSize(pages int64) int { return headerSize + int(pages+63)/64*8 + sumSize }

// Encode returns the set as it is stored.
func (s *Set) Encode() []byte {
	b := make([]byte, 0, FileSize(s.pages))
	b = append(b, magic...)
	b = append(b, s.id[:]...)
	for _, n := range []uint64{uint64(s.pages), s.Cold.Sessions, s.Cold.Faults, s.Warm.Sessions, s.Warm.Faults} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	for _, w := range s.words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return binary.LittleEndian.AppendUint32(b, sum(b))
}

func sum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// Pages of the memory that it is a set of.
func (s *Set) Pages() int64 { return s.pages }

// Add puts a page into the set.
func (s *Set) Add(page int64) { s.words[page/64] |= 1 << (page % 64) }

// Has tells whether a page is in the set.
func (s *Set) Has(page int64) bool { return s.words[page/64]>>(page%64)&1 != 0 }

// Count returns the number of pages in the set.
func (s *Set) Count() int64 {
	n := 0
	for _, w := range s.words {
		n += bits.OnesCount64(w)
	}
	return int64(n)
}

// All yields the pages in the set, in ascending order.
func (s *Set) All() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for i, w := range s.words {
			for ; w != 0; w &= w - 1 {
				if !yield(int64(i)*64 + int64(bits.TrailingZeros64(w))) {
					return
				}
			}
		}
	}
}

// HitRate tells which part of the faults that a clone would wait for the set
// saves: 1 − (mean faults of clones with it ÷ mean faults of clones without). It
// is unknown (false) before both were seen.
func (s *Set) HitRate() (float64, bool) {
	if s.Cold.Sessions == 0 || s.Warm.Sessions == 0 || s.Cold.Faults == 0 {
		return 0, false
	}
	return max(0, 1-s.Warm.mean()/s.Cold.mean()), true
}
