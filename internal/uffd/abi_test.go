//go:build linux

package uffd

import (
	"encoding/binary"
	"testing"
	"unsafe"
)

// The kernel's sizes, from include/uapi/linux/userfaultfd.h; the request codes
// contain them: _IOC(dir, type, nr, size) = dir<<30 | size<<16 | type<<8 | nr.
func TestABI(t *testing.T) {
	const read, write = 2, 1
	for _, c := range []struct {
		name     string
		size     uintptr
		dir, nr  uint32
		kernel   uintptr
		constant uint32
	}{
		{"api", unsafe.Sizeof(argAPI{}), read | write, 0x3f, 24, ioctlAPI},
		{"register", unsafe.Sizeof(argRegister{}), read | write, 0, 32, ioctlRegister},
		{"unregister", unsafe.Sizeof(argRange{}), read, 1, 16, ioctlUnregister},
		{"wake", unsafe.Sizeof(argRange{}), read, 2, 16, ioctlWake},
		{"copy", unsafe.Sizeof(argCopy{}), read | write, 3, 40, ioctlCopy},
		{"zeropage", unsafe.Sizeof(argZeroPage{}), read | write, 4, 32, ioctlZeroPage},
		{"new", 0, 0, 0, 0, ioctlNew},
	} {
		if c.size != c.kernel {
			t.Errorf("%s: struct of %d bytes, the kernel's has %d", c.name, c.size, c.kernel)
		}
		if want := c.dir<<30 | uint32(c.kernel)<<16 | 0xaa<<8 | c.nr; c.constant != want {
			t.Errorf("%s: request %#x, want %#x", c.name, c.constant, want)
		}
	}
}

func message(kind byte, words ...uint64) []byte {
	m := make([]byte, msgSize)
	m[0] = kind
	for i, w := range words {
		binary.NativeEndian.PutUint64(m[8+8*i:], w)
	}
	return m
}

func TestDecode(t *testing.T) {
	for _, c := range []struct {
		raw  []byte
		want Event
	}{
		{message(0x12, 1, 0x7000), Event{Type: EventPageFault, Write: true, Address: 0x7000}},
		{message(0x12, 0, 0x7000, 42), Event{Type: EventPageFault, Address: 0x7000}},
		{message(0x13, 9), Event{Type: EventFork, FD: 9}},
		{message(0x14, 1, 2, 3), Event{Type: EventRemap, Address: 1, End: 2, Size: 3}},
		{message(0x15, 1, 2), Event{Type: EventRemove, Address: 1, End: 2}},
		{message(0x16, 1, 2), Event{Type: EventUnmap, Address: 1, End: 2}},
	} {
		got, err := decodeEvent(c.raw)
		if err != nil || got != c.want {
			t.Errorf("%x: got %+v, %v, want %+v", c.raw, got, err, c.want)
		}
	}
	if _, err := decodeEvent(message(0x11)); err == nil {
		t.Error("an unknown event was accepted")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(message(0x12, 1, 0x7000))
	f.Add(append(message(0x15, 1, 2), message(0x13, 9)...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b := BufferOver(make([]byte, BufferSize))
		n := copy(b.raw, raw)
		ev, err := b.decode(n)
		if err == nil && len(ev)*msgSize != n {
			t.Fatalf("%d events from %d bytes", len(ev), n)
		}
	})
}
