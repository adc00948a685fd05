//go:build linux

package pstest

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// mapping is a region of a VMM's memory, as Firecracker describes it in its
// handshake (GuestRegionUffdMapping).
type mapping struct {
	Addr     uint64 `json:"base_host_virt_addr"`
	Size     uint64 `json:"size"`
	Offset   uint64 `json:"offset"`
	PageSize uint64 `json:"page_size"`
	// PageSizeKiB is in bytes, as Firecracker has it.
	PageSizeKiB uint64 `json:"page_size_kib"`
}

// memory is that of a VMM, inside its process.
type memory struct {
	mappings []mapping
	regions  [][]byte
	// pages has the regions' pages of 4096 bytes by their place in the memory file.
	pages [][]byte
	// pageSize is what is given back at once.
	pageSize int
	fd       *uffd.FD // nil with [Plain]
}

// newMemory maps the regions and puts a userfaultfd on them, as Firecracker does
// in PUT /snapshot/load: REMOVE events, missing pages.
func newMemory(c *Config, template int) (_ *memory, err error) {
	m := &memory{pageSize: c.PageSize}
	if err := m.mapRegions(c, template); err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	if c.Shape == Plain {
		return m, nil
	}
	if m.fd, err = uffd.Open(); err != nil {
		return nil, err
	}
	if _, err := m.fd.API(uffd.FeatureEventRemove); err != nil {
		return nil, err
	}
	for _, r := range m.mappings {
		if _, err := m.fd.Register(r.Addr, r.Size, uffd.ModeMissing); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// number is the userfaultfd's, or -1.
func (m *memory) number() int {
	n := -1
	if m.fd != nil {
		_ = m.fd.Use(func(fd int) error { n = fd; return nil })
	}
	return n
}

// gap is left between regions, and is a multiple of all page sizes.
const gap = HugePageSize

func (m *memory) mapRegions(c *Config, template int) error {
	total := int64(gap)
	for _, r := range c.Regions {
		total += r.Size + 2*gap
	}
	// A reservation, in which each region gets the place that it is to have.
	reserved, err := mmap(0, uintptr(total), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, -1, 0)
	if err != nil {
		return err
	}
	order := make([]int, len(c.Regions))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return c.Regions[a].Slot - c.Regions[b].Slot })
	m.mappings, m.regions = make([]mapping, len(order)), make([][]byte, len(order))
	at := (reserved + gap - 1) / gap * gap
	for _, i := range order {
		r := c.Regions[i]
		flags, fd, offset := unix.MAP_PRIVATE|unix.MAP_FIXED, -1, int64(0)
		switch {
		case c.PageSize == HugePageSize:
			flags |= unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | unix.MAP_NORESERVE // as Firecracker's
		case c.Shape != Anonymous:
			fd, offset = template, r.Offset
		default:
			flags |= unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
		}
		if _, err := mmap(at, uintptr(r.Size), unix.PROT_READ|unix.PROT_WRITE, flags, fd, offset); err != nil {
			return err
		}
		m.mappings[i] = mapping{
			Addr: uint64(at), Size: uint64(r.Size), Offset: uint64(r.Offset), PageSize: uint64(c.PageSize), PageSizeKiB: uint64(c.PageSize),
		}
		m.regions[i] = bytesAt(at, int(r.Size))
		m.addPages(i)
		at += (uintptr(r.Size) + 2*gap - 1) / gap * gap
	}
	return nil
}

func (m *memory) addPages(region int) {
	first := int(m.mappings[region].Offset) / PageSize
	mem := m.regions[region]
	if need := first + len(mem)/PageSize; need > len(m.pages) {
		m.pages = slices.Grow(m.pages, need-len(m.pages))[:need]
	}
	for i := range len(mem) / PageSize {
		m.pages[first+i] = mem[i*PageSize : (i+1)*PageSize : (i+1)*PageSize]
	}
}

// span is count pages from first on, which lie in one region.
func (m *memory) span(first, count int) ([]byte, error) {
	for i, r := range m.mappings {
		at := int64(first)*PageSize - int64(r.Offset)
		if end := at + int64(count)*PageSize; at >= 0 && end <= int64(r.Size) {
			return m.regions[i][at:end], nil
		}
	}
	return nil, fmt.Errorf("pages %d to %d are not in one region", first, first+count-1)
}

// mmap is unix.Mmap with an address.
func mmap(at, size uintptr, prot, flags, fd int, offset int64) (uintptr, error) {
	p, _, errno := unix.Syscall6(unix.SYS_MMAP, at, size, uintptr(prot), uintptr(flags), uintptr(uint32(fd)), uintptr(offset))
	if errno != 0 {
		return 0, os.NewSyscallError("mmap", errno)
	}
	return p, nil
}

// bytesAt returns memory that was mapped, and that Go's garbage collector has
// nothing to do with.
func bytesAt(addr uintptr, n int) []byte {
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), n)
}

func munmap(mem []byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem)), 0); errno != 0 {
		return os.NewSyscallError("munmap", errno)
	}
	return nil
}

// wordAt is word i of a page. Words are read and written in one piece, also under
// the race detector, so that who reads a page that somebody writes to sees no half ones.
func wordAt(page []byte, i int) *uint64 {
	return (*uint64)(unsafe.Pointer(&page[8*i : 8*i+8][0]))
}

func get(page []byte, word int) uint64    { return atomic.LoadUint64(wordAt(page, word)) }
func put(page []byte, word int, w uint64) { *wordAt(page, word) = w }
