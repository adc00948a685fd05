//go:build linux

package pageserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/pagesum"
)

// zeros is a page of them, never written to.
var zeros [hugePageSize]byte

// readTries is how often a page is read that cannot be, or is not what it was,
// before its clone is given up: after 10, 40 and 160 ms more.
const readTries = 4

// source is the memory file. It is read, not mapped: what was cut off is an
// error then, where a mapping would raise SIGBUS.
type source struct {
	file interface {
		io.ReaderAt
		io.Closer
	}
	size int64
	// fd is the file's number for what os.File does not do, or -1.
	fd int
	// direct is the file without the page cache, or nil where there is no such way.
	direct *os.File
	// sums tell whether a page is what it was; nil where nobody knows.
	sums *pagesum.Table
	// zero has the pages that are known to be zeros; they need not be read.
	zero bitmap
}

// errSlow means that an answer has to wait for something.
var errSlow = errors.New("would block")

// errChanged means that a page is not what it was when the snapshot was made.
var errChanged = errors.New("its content changed")

// openSource opens a memory file, which is whole pages, and the sums of its pages
// unless that path is empty.
func openSource(path, sums string) (_ *source, err error) {
	// Nobody wants to know when it was last read, which takes time with each page. Only
	// its owner may ask for that.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open memory file: %w", err)
	}
	s := &source{file: f, fd: int(f.Fd())}
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("open memory file: %w", err)
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("open memory file: %s is not a file", path)
	case fi.Size() == 0 || fi.Size()%pageSize != 0:
		return nil, fmt.Errorf("open memory file: %s has %d bytes, which are not whole pages", path, fi.Size())
	}
	s.size = fi.Size()
	s.zero = newBitmap(s.size / pageSize)
	s.findHoles()
	// The kernel's reading ahead would leave in the page cache what nobody drops,
	// zeros for holes among it; willNeed reads ahead where it helps.
	_ = unix.Fadvise(s.fd, 0, 0, unix.FADV_RANDOM)
	if sums != "" {
		if err := s.readSums(sums); err != nil {
			return nil, err
		}
	}
	// Not everywhere: tmpfs refuses before Linux 6.6.
	if s.direct, err = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0); err != nil {
		s.direct, err = nil, nil
	}
	return s, nil
}

func (s *source) close() error {
	if s.direct != nil {
		s.direct.Close()
	}
	return s.file.Close()
}

// findHoles notes what a sparse file does not have. Where the file system cannot
// tell, all of it is data.
func (s *source) findHoles() {
	for pos := int64(0); pos < s.size; {
		data, err := unix.Seek(s.fd, pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data = s.size
		} else if err != nil {
			return
		}
		for p := (pos + pageSize - 1) / pageSize; p < data/pageSize; p++ {
			s.zero.set(p)
		}
		if data >= s.size {
			return
		}
		if pos, err = unix.Seek(s.fd, data, unix.SEEK_HOLE); err != nil {
			return
		}
	}
}

func (s *source) readSums(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open page sums: %w", err)
	}
	defer f.Close()
	if s.sums, err = pagesum.Read(f, s.size/pageSize); err != nil {
		return fmt.Errorf("%w: %s", err, path)
	}
	for p := range s.size / pageSize {
		if s.sums.Sum(p) == 0 {
			s.zero.set(p)
		}
	}
	return nil
}

// reader reads whole pages of the memory file.
type reader func(buf []byte, off int64) error

// readNow fills buf with what is in the page cache; else it is errSlow.
func (s *source) readNow(buf []byte, off int64) error {
	if s.fd < 0 {
		return errSlow
	}
	iov := unix.Iovec{Base: &buf[0]}
	iov.SetLen(len(buf))
	// It does not wait, so that Go's scheduler need not know.
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(s.fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	if errno != 0 || int(n) < len(buf) || s.check(buf, off) != nil {
		return errSlow // also for an error: the slow way meets it again
	}
	return nil
}

// read fills buf from offset off. What goes wrong may be over in a moment, so it
// tries again, not for long.
func (s *source) read(buf []byte, off int64) error {
	wait := 10 * time.Millisecond
	for try := 1; ; try++ {
		err := s.readOnce(buf, off)
		if err == nil || try == readTries {
			return err
		}
		time.Sleep(wait)
		wait *= 4
		s.drop(off, int64(len(buf))) // what is wrong may be the cached copy
	}
}

func (s *source) readOnce(buf []byte, off int64) error {
	n, err := s.file.ReadAt(buf, off)
	switch {
	case n == len(buf):
		return s.check(buf, off)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("read memory file: it ends at %#x, but had %#x bytes", off+int64(n), s.size)
	default:
		return fmt.Errorf("read memory file at %#x: %w", off, err)
	}
}

// check tells whether pages are what they were.
func (s *source) check(buf []byte, off int64) error {
	if s.sums == nil {
		return nil
	}
	if bad := s.sums.Check(off/pageSize, buf); bad >= 0 {
		return fmt.Errorf("read memory file at %#x: %w; `fcvm snapshot verify` tells more", bad*pageSize, errChanged)
	}
	return nil
}

// readDirect fills buf, which is aligned as pages are, past the page cache.
func (s *source) readDirect(buf []byte, off int64) error {
	if s.direct == nil {
		return s.read(buf, off)
	}
	if n, err := s.direct.ReadAt(buf, off); err != nil || n < len(buf) || s.check(buf, off) != nil {
		return s.read(buf, off)
	}
	return nil
}

// drop takes a part of the file out of the page cache: what the template has need
// not be in memory twice. What others map stays (posix_fadvise(2)).
func (s *source) drop(off, n int64) {
	if s.fd >= 0 {
		_ = unix.Fadvise(s.fd, off, n, unix.FADV_DONTNEED)
	}
}

// willNeed starts to read a part of the file into the page cache.
func (s *source) willNeed(off, n int64) {
	if s.fd >= 0 {
		_ = unix.Fadvise(s.fd, off, n, unix.FADV_WILLNEED)
	}
}

// isZero tells whether a page that was read is zeros, and remembers it.
func (s *source) isZero(page int64, data []byte) bool {
	if s.zero.hasAll(page, int64(len(data))/pageSize) {
		return true
	}
	if s.sums != nil || !bytes.Equal(data, zeros[:len(data)]) {
		return false
	}
	for p := range int64(len(data)) / pageSize {
		s.zero.set(page + p)
	}
	return true
}
