//go:build linux

package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EventType is the kind of an [Event] (UFFD_EVENT_*).
type EventType uint8

// The events.
const (
	EventPageFault EventType = 0x12
	EventFork      EventType = 0x13
	EventRemap     EventType = 0x14
	EventRemove    EventType = 0x15
	EventUnmap     EventType = 0x16
)

// String names the event as userfaultfd(2) does, without its prefix.
func (t EventType) String() string {
	switch t {
	case EventPageFault:
		return "pagefault"
	case EventFork:
		return "fork"
	case EventRemap:
		return "remap"
	case EventRemove:
		return "remove"
	case EventUnmap:
		return "unmap"
	default:
		return fmt.Sprintf("event %#x", uint8(t))
	}
}

// Event is one message of a userfaultfd.
type Event struct {
	Type EventType
	// Write is set for a fault of a write (UFFD_PAGEFAULT_FLAG_WRITE).
	Write bool
	// Address of a fault, rounded down to its page; start of what was removed or
	// unmapped; old address of what was moved.
	Address uint64
	// End of what was removed or unmapped, exclusive; new address of what was
	// moved.
	End uint64
	// Size of what was moved.
	Size uint64
	// FD is the userfaultfd of a child process, for [EventFork]. The receiver
	// owns it.
	FD int
}

// MaxEvents is how many events are read at once.
const MaxEvents = 64

// BufferSize is how much memory they take, in bytes.
const BufferSize = MaxEvents * msgSize

// Buffer is space for 64 events. The zero value is ready; its owner uses it from
// one goroutine at a time.
type Buffer struct {
	raw    []byte
	used   int // bytes of raw that hold what was last read
	events []Event
}

// BufferOver returns a buffer in memory of the caller's, [BufferSize] bytes of
// zeros. Where that is shared memory, locked (mlock(2)), events outlive the process that
// read them: the kernel has written what it handed out before a signal, even
// SIGKILL, can end the reader, because read(2) of a userfaultfd goes back to user
// mode only after it has copied all of it.
func BufferOver(mem []byte) *Buffer { return &Buffer{raw: mem[:BufferSize:BufferSize]} }

// Clear forgets what was read: whoever finds the memory of the buffer later finds
// no events in it.
func (b *Buffer) Clear() {
	for at := 0; at < b.used; at += msgSize {
		b.raw[at] = 0
	}
	b.used = 0
}

// Left returns the events that a buffer's memory still holds because its owner
// ended before it cleared them. It reads them from mem, and does not change it.
func Left(mem []byte) ([]Event, error) {
	var left []Event
	for raw := mem[:BufferSize]; len(raw) > 0; raw = raw[msgSize:] {
		if raw[0] == 0 {
			continue
		}
		e, err := decodeEvent(raw[:msgSize])
		if err != nil {
			return nil, err
		}
		left = append(left, e)
	}
	return left, nil
}

// Full tells whether the last read filled the buffer: more events may wait.
func (b *Buffer) Full() bool { return b.used == len(b.raw) }

// ReadEvents reads what waits, at most 64 events, and does not block: none is an empty
// result. The result is valid until the buffer is used again. Reading a REMOVE
// lets the thread go on that removes the pages.
//
// The kernel hands out faults before all other events (userfaultfd_ctx_read in
// fs/userfaultfd.c), so who wants to know of a REMOVE before serving faults has
// to read until nothing is left.
func (f *FD) ReadEvents(b *Buffer) ([]Event, error) {
	return f.readEvents(b, MaxEvents, false)
}

// WaitEvents is ReadEvents, but waits where that was made possible by SetBlocking, and
// reads most events, at most [MaxEvents]. It may return nothing. To read one alone is
// faster where there is but one: the kernel does not look for another.
func (f *FD) WaitEvents(b *Buffer, most int) ([]Event, error) { return f.readEvents(b, most, true) }

func (f *FD) readEvents(b *Buffer, most int, wait bool) ([]Event, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return nil, ErrClosed
	}
	if b.raw == nil {
		b.raw = make([]byte, BufferSize)
	}
	b.used = 0
	size := min(most, MaxEvents) * msgSize
	for {
		var n uintptr
		var errno syscall.Errno
		if wait {
			n, _, errno = unix.Syscall(unix.SYS_READ, uintptr(f.fd), uintptr(unsafe.Pointer(&b.raw[0])), uintptr(size))
		} else {
			// Go's scheduler need not know.
			n, _, errno = unix.RawSyscall(unix.SYS_READ, uintptr(f.fd), uintptr(unsafe.Pointer(&b.raw[0])), uintptr(size))
		}
		switch errno {
		case 0:
			return b.decode(int(n))
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return nil, nil
		default:
			return nil, fmt.Errorf("read userfaultfd: %w", errno)
		}
	}
}

// SetBlocking says whether reading events waits for some: [FD.WaitEvents] then does, and
// nothing else may be called that reads. It concerns all descriptors of this userfaultfd,
// also those in other processes. Undone, and a signal sent to who waits, it ends the wait.
func (f *FD) SetBlocking(wait bool) error {
	return f.Use(func(fd int) error {
		if err := unix.SetNonblock(fd, !wait); err != nil {
			return fmt.Errorf("set up userfaultfd: %w", err)
		}
		return nil
	})
}

// Poll waits until there are events (poll(2)), or a signal comes, and tells which.
// Reading must not be blocking.
func (f *FD) Poll() (ready bool, err error) {
	err = f.Use(func(fd int) error {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for userfaultfd: %w", err)
		}
		ready = n > 0
		return nil
	})
	return ready, err
}

func (b *Buffer) decode(n int) ([]Event, error) {
	b.events, b.used = b.events[:0], n
	if n%msgSize != 0 {
		return nil, fmt.Errorf("read userfaultfd: %d bytes are not whole messages", n)
	}
	for raw := b.raw[:n]; len(raw) > 0; raw = raw[msgSize:] {
		e, err := decodeEvent(raw[:msgSize])
		if err != nil {
			return nil, err
		}
		b.events = append(b.events, e)
	}
	return b.events, nil
}

// decodeEvent reads a struct uffd_msg: the type, seven reserved bytes, and 24
// bytes whose meaning depends on the type.
func decodeEvent(m []byte) (Event, error) {
	u64 := func(at int) uint64 { return binary.NativeEndian.Uint64(m[at:]) }
	e := Event{Type: EventType(m[0])}
	switch e.Type {
	case EventPageFault:
		e.Write = u64(8)&1 != 0
		e.Address = u64(16)
	case EventFork:
		e.FD = int(binary.NativeEndian.Uint32(m[8:]))
	case EventRemap:
		e.Address, e.End, e.Size = u64(8), u64(16), u64(24)
	case EventRemove, EventUnmap:
		e.Address, e.End = u64(8), u64(16)
	default:
		return Event{}, fmt.Errorf("read userfaultfd: unknown %s", e.Type)
	}
	return e, nil
}
