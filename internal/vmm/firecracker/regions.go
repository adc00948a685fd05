package firecracker

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"fcvm/internal/procmem"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
)

// pieces are the sizes of the mappings that Firecracker makes for the guest's memory, in
// the order of guest addresses: one below the hole for devices that ends at 4 GiB, and what
// does not fit there above it.
func pieces(size int64, v fcapi.Version) []uint64 {
	low := v.LowMemory()
	if size <= low {
		return []uint64{uint64(size)}
	}
	return []uint64{uint64(low), uint64(size - low)}
}

// restoredMemory finds the memory of a guest that was loaded and did not run yet. It is of
// a file, or anonymous with a userfaultfd, and so no part of another mapping.
func restoredMemory(pid int, sizes []uint64) ([]vmm.Region, error) {
	all, err := unreserved(pid)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	if regions, ok := whole(all, sizes); ok {
		return regions, nil
	}
	if len(sizes) == 1 {
		return nil, fmt.Errorf("find guest memory: no mapping of %d bytes, or several, of %d", sizes[0], len(all))
	}
	// Two without a file: which is which is told by the first one's content, for which this
	// waits for the page server as the guest does.
	return anonymousMemory(pid, sizes, console)
}

// whole returns the mappings that are of the wanted sizes, if there is one of each, at the
// offset in a file that it has to have.
func whole(all []mapping, sizes []uint64) ([]vmm.Region, bool) {
	var regions []vmm.Region
	offset := uint64(0)
	for _, size := range sizes {
		var found []mapping
		for _, m := range all {
			if m.to-m.from == size && (len(sizes) == 1 || m.file && m.offset == offset) {
				found = append(found, m)
			}
		}
		if len(found) != 1 {
			return nil, false
		}
		regions = append(regions, vmm.Region{Addr: found[0].from, Size: int64(size), Offset: int64(offset)})
		offset += size
	}
	return regions, true
}

// anonymousMemory finds the guest's memory where it has no file, as inside a Firecracker that
// has just booted it, by words of the kernel's command line in it. It is private memory for
// which no swap is reserved, and so are the heaps that glibc has for threads: the kernel may
// have made one mapping of both.
func anonymousMemory(pid int, sizes []uint64, words string) ([]vmm.Region, error) {
	all, err := unreserved(pid)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	mem, err := procmem.Open(pid)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	defer func() { _ = mem.Close() }()
	for _, addr := range candidates(all, sizes) {
		if !holds(mem, addr, words) {
			continue
		}
		regions := []vmm.Region{{Addr: addr, Size: int64(sizes[0])}}
		if len(sizes) == 1 {
			return regions, nil
		}
		second, ok := beside(all, mapping{from: addr, to: addr + sizes[0]}, sizes[1])
		if !ok {
			return nil, fmt.Errorf("find guest memory: its first %d bytes are at %#x, and the others are not known", sizes[0], addr)
		}
		return append(regions, vmm.Region{Addr: second, Size: int64(sizes[1]), Offset: int64(sizes[0])}), nil
	}
	return nil, fmt.Errorf("find guest memory: none of %d mappings holds the kernel's command line", len(all))
}

// mapping is a range of addresses, and where in a file it begins, if it is of one.
type mapping struct {
	from, to, offset uint64
	file             bool
}

// candidates are where the first of two neighbours may begin, or one by itself: at one end of a
// mapping or the other, with something else behind or before it.
func candidates(all []mapping, sizes []uint64) []uint64 {
	var at []uint64
	sum := uint64(0)
	for _, size := range sizes {
		sum += size
	}
	for _, m := range all {
		for _, addr := range []uint64{m.from, m.to - sizes[0], m.from + sum - sizes[0], m.to - sum} {
			if addr >= m.from && addr <= m.to && m.to-addr >= sizes[0] && !slices.Contains(at, addr) {
				at = append(at, addr)
			}
		}
	}
	return at
}

// beside finds the second piece of the guest's memory: right before the first one, where the
// kernel puts what is mapped later, right behind it, or the one mapping of its size.
func beside(all []mapping, first mapping, size uint64) (addr uint64, ok bool) {
	within := func(from uint64) bool {
		return slices.ContainsFunc(all, func(m mapping) bool { return m.from <= from && from+size <= m.to })
	}
	switch {
	case first.from >= size && within(first.from-size):
		return first.from - size, true
	case within(first.to):
		return first.to, true
	}
	for _, m := range all {
		if m.to-m.from == size {
			if ok {
				return 0, false
			}
			addr, ok = m.from, true
		}
	}
	return addr, ok
}

// cmdlineStart is where Firecracker puts the kernel's command line, in the guest's memory.
// Linux leaves the first MiB alone for good.
const cmdlineStart = 0x20000

// holds tells whether the command line's place holds words of it.
func holds(mem io.ReaderAt, addr uint64, words string) bool {
	const cmdlineMax = 2048 // Firecracker takes no longer ones
	b := make([]byte, cmdlineMax)
	_, err := mem.ReadAt(b, int64(addr+cmdlineStart))
	return err == nil && bytes.Contains(b, []byte(words))
}

// unreserved lists private writable mappings without a reservation of swap.
func unreserved(pid int) ([]mapping, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/smaps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseSmaps(f)
}

// parseSmaps reads /proc/PID/smaps (proc(5)): a line for each mapping, and lines
// about it, of which VmFlags is the last.
func parseSmaps(r io.Reader) ([]mapping, error) {
	var all []mapping
	var cur mapping
	var private bool
	s := bufio.NewScanner(r)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		if len(fields) == 0 {
			continue
		}
		if name, ok := strings.CutSuffix(fields[0], ":"); ok {
			if name == "VmFlags" && private && slices.Contains(fields[1:], "nr") {
				all = append(all, cur)
			}
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		var errs [3]error
		cur.from, errs[0] = strconv.ParseUint(from, 16, 64)
		cur.to, errs[1] = strconv.ParseUint(to, 16, 64)
		if len(fields) >= 5 {
			cur.offset, errs[2] = strconv.ParseUint(fields[2], 16, 64)
		}
		if errors.Join(errs[:]...) != nil || cur.to < cur.from || len(fields) < 5 {
			return nil, fmt.Errorf("malformed mapping %.80q", s.Text())
		}
		// Its inode. Anonymous memory of huge pages has one, too.
		cur.file = fields[4] != "0" && (len(fields) < 6 || fields[5] != "/anon_hugepage")
		private = fields[1] == "rw-p"
	}
	return all, s.Err()
}
