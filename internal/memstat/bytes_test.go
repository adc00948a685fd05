package memstat

import "unsafe"

// bytesAt is the mapping at p.
func bytesAt(p unsafe.Pointer, n int) []byte { return unsafe.Slice((*byte)(p), n) }
