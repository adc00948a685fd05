//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Outcomes on which the caller decides.
var (
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("userfaultfd is closed")
	// ErrAgain means that the memory's layout is changing (an event waits to be
	// read, or was just read): the same call succeeds later. See done of
	// [FD.Copy] for how far it got.
	ErrAgain = errors.New("memory is changing")
	// ErrExist means that a page is there already. Nobody was woken.
	ErrExist = errors.New("page is present")
	// ErrGone means that the process whose memory this was has ended (ESRCH).
	ErrGone = errors.New("process has ended")
	// ErrNotRegistered means that no registered mapping is at this address (ENOENT).
	ErrNotRegistered = errors.New("range is not registered")
)

// FD owns a userfaultfd. Its methods may be called concurrently.
type FD struct {
	// mu is held for reading by whatever uses fd, and for writing by Close:
	// TestCloseWaitsForUsers.
	mu sync.RWMutex
	fd int // -1 once closed
}

func newFD(fd int) *FD { return &FD{fd: fd} }

// Close gives up the descriptor. It is idempotent.
func (f *FD) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	return syscall.Close(fd)
}

// Use runs fn with the descriptor's number, which is valid until fn returns: to
// send it to another process, for instance. fn must not close it.
func (f *FD) Use(fn func(fd int) error) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return ErrClosed
	}
	return fn(f.fd)
}

// Dup returns another descriptor of the same userfaultfd (F_DUPFD_CLOEXEC), with a
// life of its own.
func (f *FD) Dup() (*FD, error) {
	var dup int
	err := f.Use(func(fd int) (err error) {
		dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("duplicate userfaultfd: %w", err)
	}
	return newFD(dup), nil
}

func (f *FD) ioctl(req uintptr, arg unsafe.Pointer) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return ErrClosed
	}
	for {
		// Raw, as none of them waits: the runtime need not be told (0.1 µs).
		_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(f.fd), req, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return ErrAgain
		case unix.EEXIST:
			return ErrExist
		case unix.ESRCH:
			return ErrGone
		case unix.ENOENT:
			return ErrNotRegistered
		default:
			return errno
		}
	}
}

// API does the handshake with the kernel, once for a descriptor, and asks for
// features. It returns all that this kernel has. Asking for one that it does
// not have fails with EINVAL and leaves the descriptor unusable.
func (f *FD) API(want Features) (Features, error) {
	a := argAPI{api: apiVersion, features: uint64(want)}
	if err := f.ioctl(ioctlAPI, unsafe.Pointer(&a)); err != nil {
		return 0, fmt.Errorf("set up userfaultfd with features %#x: %w", uint64(want), err)
	}
	return Features(a.features), nil
}

// Register asks to be told of accesses to the pages of [start, start+size). It
// returns what may be done to them. Mappings that take part are anonymous
// memory, shared memory (also mapped privately) and huge pages.
func (f *FD) Register(start, size uint64, mode Mode) (Ioctls, error) {
	a := argRegister{rng: argRange{start: start, size: size}, mode: uint64(mode)}
	if err := f.ioctl(ioctlRegister, unsafe.Pointer(&a)); err != nil {
		return 0, fmt.Errorf("register memory %#x+%#x: %w", start, size, err)
	}
	return Ioctls(a.ioctls), nil
}

// Unregister undoes Register. Whoever waits in the range is woken.
func (f *FD) Unregister(start, size uint64) error {
	a := argRange{start: start, size: size}
	if err := f.ioctl(ioctlUnregister, unsafe.Pointer(&a)); err != nil {
		return fmt.Errorf("unregister memory %#x+%#x: %w", start, size, err)
	}
	return nil
}

// Wake lets threads that wait for a page of the range try again.
func (f *FD) Wake(start, size uint64) error {
	a := argRange{start: start, size: size}
	return f.ioctl(ioctlWake, unsafe.Pointer(&a))
}

// Copy puts src, whole pages, at dst as private pages and wakes who waits
// there. It returns how many bytes were placed, also beside an error: a call
// over several pages stops with [ErrAgain] at the first page that is present
// already, having placed those before it; with [ErrExist] and 0 when that is
// the first. src need not be page-aligned.
func (f *FD) Copy(dst uint64, src []byte) (done int64, err error) {
	if len(src) == 0 {
		return 0, nil
	}
	return f.copy(uintptr(dst), uintptr(unsafe.Pointer(&src[0])), len(src))
}

// copy has the kernel read src by the address that stands in a struct, where the
// garbage collector does not see it. The directive keeps the memory alive, and off the
// stack, which may move (cmd/compile, "uintptrescapes").
//
//go:uintptrescapes
//go:noinline
func (f *FD) copy(dst, src uintptr, size int) (done int64, err error) {
	a := argCopy{dst: uint64(dst), src: uint64(src), size: uint64(size)}
	err = f.ioctl(ioctlCopy, unsafe.Pointer(&a))
	return placed(a.done), err
}

// ZeroPage maps the kernel's zero page over [dst, dst+size) and wakes who waits
// there. It costs no memory until a page is written to. The result is as
// Copy's. Ranges of huge pages do not allow it.
func (f *FD) ZeroPage(dst, size uint64) (done int64, err error) {
	a := argZeroPage{rng: argRange{start: dst, size: size}}
	err = f.ioctl(ioctlZeroPage, unsafe.Pointer(&a))
	return placed(a.done), err
}

// placed reads the answer of Copy and ZeroPage, where the kernel stores a
// negative errno when nothing was placed.
func placed(n int64) int64 { return max(n, 0) }
