package procmem

import (
	"testing"
	"unsafe"
)

// addrOf is where a mapping begins.
func addrOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// The sizes are in the ioctl's number and in the kernel's header.
func TestLayout(t *testing.T) {
	if n := unsafe.Sizeof(scanArg{}); n != ioctlPagemapScan>>16&0x3fff {
		t.Errorf("scanArg has %d bytes", n)
	}
	if n := unsafe.Sizeof(pageRegion{}); n != 24 {
		t.Errorf("pageRegion has %d bytes", n)
	}
}
