package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/link"
)

const (
	// portTime is how long a port may take to appear: its name comes from the
	// host, after the driver is there.
	portTime = 10 * time.Second
	// logTime is how long a container waits for the host to take a log record.
	logTime = 10 * time.Second
)

// openPort opens the virtio-serial port of a name. Go's poller waits for it, so
// that a blocked read costs neither thread nor CPU.
func openPort(name string) (*os.File, error) {
	for end := time.Now().Add(portTime); ; time.Sleep(time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil || strings.TrimSpace(string(b)) != name {
				continue
			}
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			if errors.Is(err, os.ErrNotExist) {
				continue // devtmpfs is not that far yet
			}
			if err != nil {
				return nil, fmt.Errorf("open port %s: %w", name, err)
			}
			return f, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("open port %s: the VMM offers none of that name", name)
		}
	}
}

// port implements link.Port on a virtio-serial port.
type port struct {
	f    *os.File
	raw  syscall.RawConn // of f
	gone bool            // Read told it
}

func newPort(f *os.File) (*port, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &port{f: f, raw: raw}, nil
}

// Read implements link.Port. While the host is away, read(2) gives 0 and poll(2)
// says that there is something to read (drivers/char/virtio_console.c): only the
// poller's edges make waiting for the next host possible.
func (p *port) Read(b []byte) (n int, err error) {
	waitErr := p.raw.Read(func(fd uintptr) bool {
		r, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		n, err = int(r), nil
		if errno == unix.EAGAIN {
			return false
		}
		if errno != 0 {
			n, err = 0, errno
		}
		if err == nil && n == 0 {
			if p.gone {
				return false
			}
			p.gone = true
			err = link.ErrHostGone
			return true
		}
		p.gone = false
		return true
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return max(n, 0), err
}

// Write implements link.Port: the driver takes what fits one frame as a whole.
func (p *port) Write(b []byte) (n int, err error) {
	waitErr := p.raw.Write(func(fd uintptr) bool {
		r, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno == unix.EAGAIN {
			return false
		}
		if n, err = int(r), nil; errno != 0 {
			n, err = 0, errno
		}
		return true
	})
	if waitErr != nil {
		return 0, waitErr
	}
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return n, err
}

// Interrupt implements link.Port.
func (p *port) Interrupt() { _ = p.f.SetWriteDeadline(time.Unix(1, 0)) }

// Restore implements link.Port.
func (p *port) Restore() { _ = p.f.SetWriteDeadline(time.Time{}) }

// logPort never blocks a container for long: a record that the host does not
// take in time is lost, and those after it are not waited for until one succeeds.
type logPort struct {
	f     *os.File
	stuck bool
}

func (l *logPort) Write(b []byte) (int, error) {
	wait := logTime
	if l.stuck {
		wait = time.Millisecond
	}
	if err := l.f.SetWriteDeadline(time.Now().Add(wait)); err != nil {
		return 0, err
	}
	n, err := l.f.Write(b)
	_ = l.f.SetWriteDeadline(time.Time{}) // no timer stays behind
	l.stuck = err != nil
	return n, err
}
