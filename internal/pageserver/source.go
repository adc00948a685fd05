//go:build linux

package pageserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// zeros is a page of them, never written to.
var zeros [hugePageSize]byte

// source is the memory file. It is read, not mapped: what was cut off is an
// error then, where a mapping would raise SIGBUS.
type source struct {
	file interface {
		io.ReaderAt
		io.Closer
	}
	size int64
	// fd is the file's number for readNow, or -1.
	fd int
}

// errSlow means that an answer has to wait for something: the worker gives it.
var errSlow = errors.New("would block")

// openSource opens a memory file, which is whole pages.
func openSource(path string) (*source, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open memory file: %w", err)
	}
	fi, err := f.Stat()
	switch {
	case err != nil:
		err = fmt.Errorf("open memory file: %w", err)
	case !fi.Mode().IsRegular():
		err = fmt.Errorf("open memory file: %s is not a file", path)
	case fi.Size() == 0 || fi.Size()%pageSize != 0:
		err = fmt.Errorf("open memory file: %s has %d bytes, which are not whole pages", path, fi.Size())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &source{file: f, size: fi.Size(), fd: int(f.Fd())}, nil
}

// reader reads whole pages of the memory file.
type reader func(buf []byte, off int64) error

// readNow fills buf with what is in the page cache; else it is errSlow.
func (s *source) readNow(buf []byte, off int64) error {
	if s.fd < 0 {
		return errSlow
	}
	n, err := unix.Preadv2(s.fd, [][]byte{buf}, off, unix.RWF_NOWAIT)
	if err != nil || n < len(buf) {
		return errSlow // also for an error: the slow way meets it again
	}
	return nil
}

// read fills buf from offset off.
func (s *source) read(buf []byte, off int64) error {
	n, err := s.file.ReadAt(buf, off)
	if n == len(buf) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("read memory file: it ends at %#x, but had %#x bytes", off+int64(n), s.size)
	}
	return fmt.Errorf("read memory file at %#x: %w", off, err)
}

func isZero(page []byte) bool { return bytes.Equal(page, zeros[:len(page)]) }
