//go:build linux

package uffdtest

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// PageSize is that of the only architecture that fcvm runs on.
const PageSize = 4096

// Address returns where b begins. b must be mapped memory, which does not move.
func Address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// Map maps pages of private memory until the test ends: anonymous memory, or the
// file fd when it is not negative.
func Map(t testing.TB, pages, fd int) []byte {
	t.Helper()
	flags := unix.MAP_PRIVATE
	if fd < 0 {
		flags |= unix.MAP_ANONYMOUS
	}
	mem, err := unix.Mmap(fd, 0, pages*PageSize, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	return mem
}

// Touch reads mem[at], or writes 0x77 to it first, and sends what is there then.
// The access is made by a system call: a plain one would hold up the runtime's
// garbage collector for as long as nobody answers the fault.
func Touch(t testing.TB, mem []byte, at int, write bool) <-chan byte {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	result := make(chan byte, 1)
	go func() {
		defer unix.Close(p[0])
		defer unix.Close(p[1])
		cell := mem[at : at+1 : at+1]
		if write {
			if _, err := unix.Write(p[1], []byte{0x77}); err == nil {
				_, _ = unix.Read(p[0], cell)
			}
		}
		var b [1]byte
		if _, err := unix.Write(p[1], cell); err == nil {
			_, _ = unix.Read(p[0], b[:])
		}
		result <- b[0]
	}()
	return result
}

// At returns n bytes of this process's memory that were mapped at addr.
func At(addr uintptr, n int) []byte {
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), n)
}

// Await waits until f has events to read, and reads none.
func Await(t testing.TB, f *uffd.FD) {
	t.Helper()
	for {
		ready, err := f.Poll()
		if err != nil {
			t.Fatal(err)
		}
		if ready {
			return
		}
	}
}

// Next waits until at least n events came, and returns all that did.
func Next(t testing.TB, f *uffd.FD, n int) []uffd.Event {
	t.Helper()
	var got []uffd.Event
	var buf uffd.Buffer
	for len(got) < n {
		Await(t, f)
		for {
			ev, err := f.ReadEvents(&buf)
			if err != nil {
				t.Fatal(err)
			}
			if len(ev) == 0 {
				break
			}
			got = append(got, ev...)
		}
	}
	return got
}
