//go:build linux

package pageserver

import (
	"math/bits"
	"sync/atomic"
)

// bitmap has a bit for each page. 1 GiB of guest memory takes 32 KiB.
type bitmap []atomic.Uint64

func newBitmap(pages int64) bitmap { return make(bitmap, (pages+63)/64) }

func (b bitmap) has(page int64) bool { return b[page/64].Load()>>(page%64)&1 != 0 }

func (b bitmap) set(page int64) { b[page/64].Or(1 << (page % 64)) }

func (b bitmap) unset(page int64) { b[page/64].And(^(uint64(1) << (page % 64))) }

// hasAll tells it of n pages.
func (b bitmap) hasAll(first, n int64) bool {
	for p := first; p < first+n; p++ {
		if !b.has(p) {
			return false
		}
	}
	return true
}

// count returns how many there are.
func (b bitmap) count() (n int64) {
	for i := range b {
		n += int64(bits.OnesCount64(b[i].Load()))
	}
	return n
}

// run returns the first page at or behind from that is in the bitmap, and how many
// follow on it, at most most; 0 when there is none.
func (b bitmap) run(from, end, most int64) (first, n int64) {
	for first = from; first < end; {
		if word := b[first/64].Load() >> (first % 64); word != 0 {
			first += int64(bits.TrailingZeros64(word))
			break
		}
		first = (first/64 + 1) * 64
	}
	for first+n < end && n < most && b.has(first+n) {
		n++
	}
	return first, n
}
