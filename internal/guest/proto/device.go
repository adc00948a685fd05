package proto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A VMM without a second serial port gives the guest a block device for its log.
// The device's file on the host is as large as a log may become, and a hole
// behind what was written. The guest writes whole sectors, one behind the other, and never
// one again: after a crash of either side what is there is whole.
//
// A clone goes on where the golden VM's log ended, in a file of its own that has a
// hole before that.
const (
	// LogDeviceBytes is the size of the file. By it a log device's file is told from a
	// plain log.
	LogDeviceBytes = 64 << 30
	// SectorBytes is what the guest writes at once, or a multiple.
	SectorBytes = 512
	// A sector begins with how many bytes of the log it holds, uint16 big-endian; 0
	// where nothing was written.
	sectorHeader = 2
	sectorData   = SectorBytes - sectorHeader
)

// PackSectors appends b to dst as whole sectors.
func PackSectors(dst, b []byte) []byte {
	for len(b) > 0 {
		n := min(len(b), sectorData)
		dst = binary.BigEndian.AppendUint16(dst, uint16(n))
		dst = append(dst, b[:n]...)
		dst = append(dst, make([]byte, sectorData-n)...)
		b = b[n:]
	}
	return dst
}

// LogFile returns a reader of the log in f, from its beginning or, if tail is not
// negative, from at most about that many bytes before its end, perhaps in the
// middle of a record. At the end it returns io.EOF, and goes on when the log has
// grown. It does not move f's offset.
func LogFile(f *os.File, tail int64) (io.Reader, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() != LogDeviceBytes {
		from := int64(0)
		if tail >= 0 {
			from = max(0, info.Size()-tail)
		}
		return io.NewSectionReader(f, from, 1<<62-from), nil
	}
	r := &deviceReader{f: f}
	if tail >= 0 {
		if r.off, err = lastData(f, tail/sectorData*SectorBytes); err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
	}
	return r, nil
}

// seekData returns where data begins at or after off, or -1. The kernel moves f's
// offset for it, which nobody else uses.
func seekData(f *os.File, off int64) (int64, error) {
	at, err := f.Seek(off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return -1, nil
	}
	return at, err
}

// lastData returns where the last n bytes of data begin, at a sector: data is one
// piece, but for what the file system makes of it.
func lastData(f *os.File, n int64) (int64, error) {
	begin, err := seekData(f, 0)
	if begin < 0 || err != nil {
		return 0, err
	}
	end := begin
	for at := begin; at >= 0; {
		if end, err = f.Seek(at, unix.SEEK_HOLE); err != nil {
			return 0, err
		}
		if at, err = seekData(f, end); err != nil {
			return 0, err
		}
	}
	return max(begin, end-n) &^ (SectorBytes - 1), nil
}

// deviceReader reads the sectors of a log device.
type deviceReader struct {
	f     *os.File
	off   int64 // of the next sector
	begun bool  // a sector was read
	sect  [64 * SectorBytes]byte
	rest  []byte // of the last sector
}

// Read implements io.Reader.
func (r *deviceReader) Read(b []byte) (int, error) {
	n := 0
	for n < len(b) {
		if len(r.rest) == 0 {
			if err := r.next(); err != nil {
				if n > 0 {
					return n, nil
				}
				return 0, err
			}
		}
		k := copy(b[n:], r.rest)
		r.rest = r.rest[k:]
		n += k
	}
	return n, nil
}

// next reads the sector at off, after the hole that may be before the first one.
func (r *deviceReader) next() error {
	if !r.begun {
		if err := r.begin(); err != nil {
			return err
		}
	}
	s := r.sect[:SectorBytes]
	if _, err := r.f.ReadAt(s, r.off); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(s))
	if n == 0 {
		return io.EOF
	}
	// A length that cannot be is a guest's doing; its bytes are its own.
	r.rest = s[sectorHeader:min(SectorBytes, sectorHeader+n)]
	r.off += SectorBytes
	r.begun = true
	return nil
}

// begin finds the first sector. Holes end at a page, or at more, of the file system.
func (r *deviceReader) begin() error {
	at, err := seekData(r.f, r.off)
	if err != nil {
		return err
	}
	if at < 0 {
		return io.EOF
	}
	for at = max(r.off, at&^(SectorBytes-1)); ; {
		n, err := r.f.ReadAt(r.sect[:], at)
		for i := 0; i+SectorBytes <= n; i += SectorBytes {
			if binary.BigEndian.Uint16(r.sect[i:]) != 0 {
				r.off = at + int64(i)
				return nil
			}
		}
		if err != nil {
			return err
		}
		if at += int64(n); at > r.off+maxLead {
			return io.EOF
		}
	}
}

// maxLead bounds how far is looked for the first sector, in bytes: huge pages of
// tmpfs have 2 MiB.
const maxLead = 4 << 20
