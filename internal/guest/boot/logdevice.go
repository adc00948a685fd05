package boot

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/proto"
)

// logDevice writes log records to a block device of the host's, past the guest's
// page cache: what was written is on the host, also when the guest ends at once.
// See package proto for what lies there.
type logDevice struct {
	fd int

	mu  sync.Mutex
	off int64  // guarded by mu
	buf []byte // guarded by mu; at a page's beginning, as O_DIRECT wants it
}

// logBuffer holds the longest record in sectors.
const logBuffer = 64 << 10

func openLogDevice(path string) (*logDevice, error) {
	if !strings.HasPrefix(path, "/dev/") {
		return nil, fmt.Errorf("open log device: %q is none", path)
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log device %s: %w", path, err)
	}
	buf, err := unix.Mmap(-1, 0, logBuffer, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open log device %s: %w", path, err), unix.Close(fd))
	}
	return &logDevice{fd: fd, buf: buf}, nil
}

// Write implements io.Writer.
func (l *logDevice) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := proto.PackSectors(l.buf[:0], b)
	if len(s) > len(l.buf) || unsafe.SliceData(s) != unsafe.SliceData(l.buf) {
		return 0, io.ErrShortBuffer // no record is that long
	}
	for rest := s; len(rest) > 0; {
		n, err := unix.Pwrite(l.fd, rest, l.off)
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = unix.ENOSPC
		}
		if err != nil {
			return 0, fmt.Errorf("write log: %w", err)
		}
		l.off += int64(n)
		rest = rest[n:]
	}
	return len(b), nil
}
