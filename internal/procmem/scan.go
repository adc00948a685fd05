package procmem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PAGEMAP_SCAN, Linux 6.7: include/uapi/linux/fs.h and
// Documentation/admin-guide/mm/pagemap.rst. golang.org/x/sys/unix does not have
// it. The number is _IOWR('f', 16, struct pm_scan_arg).
const ioctlPagemapScan = 0xc0606610

// The categories of pages that matter here.
const (
	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPfnzero = 1 << 5
)

// scanArg is struct pm_scan_arg.
type scanArg struct {
	_                 structs.HostLayout
	size              uint64
	flags             uint64
	start, end        uint64
	walkEnd           uint64
	vec               uint64
	vecLen            uint64
	maxPages          uint64
	categoryInverted  uint64
	categoryMask      uint64
	categoryAnyofMask uint64
	returnMask        uint64
}

// pageRegion is struct page_region.
type pageRegion struct {
	_          structs.HostLayout
	start, end uint64
	categories uint64
}

// scanRegions is how many regions one call of PAGEMAP_SCAN returns at most: 24
// KiB of them.
const scanRegions = 1024

// pagemapScan returns how many regions the kernel wrote to arg.vec.
func (p *Process) pagemapScan(arg *scanArg) (int, error) {
	arg.size = uint64(unsafe.Sizeof(*arg))
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, p.pagemap.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(arg)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		case unix.ESRCH:
			return 0, ErrGone
		default:
			return 0, errno
		}
	}
}

// scanRuns is runs by PAGEMAP_SCAN.
func (p *Process) scanRuns(addr, size uint64, files bool, yield func(Run, Kind) error) error {
	vec := make([]pageRegion, scanRegions)
	var pin runtime.Pinner
	pin.Pin(&vec[0])
	defer pin.Unpin()
	end := addr + size
	for start := addr; start < end; {
		arg := scanArg{
			start: start, end: end,
			vec: uint64(uintptr(unsafe.Pointer(&vec[0]))), vecLen: scanRegions,
			categoryAnyofMask: pageIsPresent | pageIsSwapped,
			returnMask:        pageIsPfnzero,
		}
		if files {
			arg.returnMask |= pageIsFile
		} else {
			arg.categoryInverted, arg.categoryMask = pageIsFile, pageIsFile
		}
		n, err := p.pagemapScan(&arg)
		if err != nil {
			return fmt.Errorf("scan memory of process %d: %w", p.pid, err)
		}
		for _, r := range vec[:n] {
			kind := Private
			switch {
			case r.categories&pageIsPfnzero != 0:
				kind = Zero
			case r.categories&pageIsFile != 0:
				kind = File
			}
			if err := yield(Run{int64(r.start - addr), int64(r.end - r.start)}, kind); err != nil {
				return err
			}
		}
		if n < scanRegions {
			return nil
		}
		// Not walk_end: when a walk ends with the range, that is where the kernel's
		// last but one batch of 512 regions ended (fs/proc/task_mmu.c,
		// do_pagemap_scan: "walk_end isn't set when ret is zero"; seen on 6.18).
		start = vec[n-1].end
	}
	return nil
}

// Bits of an entry of /proc/PID/pagemap, proc_pid_pagemap(5).
const (
	pagemapFile    = 1 << 61
	pagemapSwapped = 1 << 62
	pagemapPresent = 1 << 63
)

// pagemapRuns is runs by /proc/PID/pagemap, for kernels before 6.7. It cannot
// tell the zero page from others without the right to see page frame numbers.
func (p *Process) pagemapRuns(addr, size uint64, files bool, yield func(Run, Kind) error) error {
	page := uint64(os.Getpagesize())
	buf := make([]byte, 64<<10)
	var cur Run
	var kind Kind
	for pos := uint64(0); pos < size; {
		b := buf[:min(uint64(len(buf)), (size-pos)/page*8)]
		n, err := p.pagemap.ReadAt(b, int64((addr+pos)/page*8))
		if n == 0 && (err == nil || errors.Is(err, io.EOF)) {
			// The address space is gone, or ends before the range.
			return fmt.Errorf("scan memory of process %d: %w", p.pid, ErrGone)
		}
		if n == 0 {
			return fmt.Errorf("scan memory of process %d: %w", p.pid, err)
		}
		for i := 0; i+8 <= n; i += 8 {
			e := binary.NativeEndian.Uint64(b[i:])
			has, is := e&(pagemapPresent|pagemapSwapped) != 0, Private
			if e&pagemapFile != 0 {
				has, is = has && files, File
			}
			if cur.Len > 0 && (!has || is != kind) {
				if err := yield(cur, kind); err != nil {
					return err
				}
				cur = Run{}
			}
			if has {
				if cur.Len == 0 {
					cur.Offset, kind = int64(pos), is
				}
				cur.Len += int64(page)
			}
			pos += page
		}
	}
	if cur.Len > 0 {
		return yield(cur, kind)
	}
	return nil
}
