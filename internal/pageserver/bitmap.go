//go:build linux

package pageserver

import "sync/atomic"

// bitmap has a bit for each page. 1 GiB of guest memory takes 32 KiB.
type bitmap []atomic.Uint64

func newBitmap(pages int64) bitmap { return make(bitmap, (pages+63)/64) }

func (b bitmap) has(page int64) bool { return b[page/64].Load()>>(page%64)&1 != 0 }

func (b bitmap) set(page int64) { b[page/64].Or(1 << (page % 64)) }
