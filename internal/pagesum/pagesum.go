// Package pagesum is the format of a snapshot's page sums: one CRC32C for each page
// of guest memory, so that who reads a single page can tell whether it is what
// was written. The SHA-256 of a whole memory file tells that only of all of it.
//
// A table guards against disks and accidents, not against an attacker: who can
// change the memory file can change the table as well.
package pagesum

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// PageSize is that of guest memory, in bytes.
const PageSize = 4096

// The file: a magic number, the number of pages as a little-endian 64-bit integer,
// and for each page its sum as a little-endian 32-bit integer.
const (
	magic      = "fcvmsum1"
	headerSize = len(magic) + 8
	entrySize  = 4
)

// ErrDamaged means that a file is not a table for the memory it should be of.
var ErrDamaged = errors.New("page sums are damaged")

// castagnoli is what amd64 and arm64 compute in hardware: 0.2 µs a page.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var zeros [PageSize]byte

// Of returns the sum of a page. That of zeros is 0, and no other page's is.
func Of(page []byte) uint32 {
	if bytes.Equal(page, zeros[:len(page)]) {
		return 0
	}
	return max(1, crc32.Checksum(page, castagnoli))
}

// Table holds the sums of a memory file. Reading it is safe for concurrent use.
type Table struct {
	raw []byte // as in the file
}

// FileSize is the size in bytes of a table for this many pages.
func FileSize(pages int64) int64 { return int64(headerSize) + pages*entrySize }

// New returns a table for this many pages, all of them zeros.
func New(pages int64) *Table {
	t := &Table{raw: make([]byte, FileSize(pages))}
	copy(t.raw, magic)
	binary.LittleEndian.PutUint64(t.raw[len(magic):], uint64(pages))
	return t
}

// Read reads a table, which has to be for this many pages. The error wraps
// [ErrDamaged] when it is none, or another memory's.
func Read(r io.Reader, pages int64) (*Table, error) {
	size := FileSize(pages)
	raw, err := io.ReadAll(io.LimitReader(r, size+1))
	if err != nil {
		return nil, fmt.Errorf("read page sums: %w", err)
	}
	if int64(len(raw)) != size || string(raw[:len(magic)]) != magic ||
		binary.LittleEndian.Uint64(raw[len(magic):]) != uint64(pages) {
		return nil, fmt.Errorf("read page sums: %w: not a table of %d pages", ErrDamaged, pages)
	}
	return &Table{raw: raw}, nil
}

// Pages is how many the table has sums of.
func (t *Table) Pages() int64 { return int64(len(t.raw)-headerSize) / entrySize }

// Set notes the sum of a page. It must not run beside other methods.
func (t *Table) Set(page int64, sum uint32) {
	binary.LittleEndian.PutUint32(t.raw[int64(headerSize)+page*entrySize:], sum)
}

// Sum returns what [Of] has to be for a page.
func (t *Table) Sum(page int64) uint32 {
	return binary.LittleEndian.Uint32(t.raw[int64(headerSize)+page*entrySize:])
}

// Check returns the number of the first page in data that is not what it was,
// or -1. Data are whole pages, the first of them number first.
func (t *Table) Check(first int64, data []byte) int64 {
	for i := int64(0); i*PageSize < int64(len(data)); i++ {
		if Of(data[i*PageSize:(i+1)*PageSize]) != t.Sum(first+i) {
			return first + i
		}
	}
	return -1
}

// Bytes returns the table as it is stored. It is not a copy.
func (t *Table) Bytes() []byte { return t.raw }
