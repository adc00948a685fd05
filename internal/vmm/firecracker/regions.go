package firecracker

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"fcvm/internal/vmm"
)

// bootedMemory finds the guest's memory inside a Firecracker that has just booted
// it. It is private anonymous memory for which no swap is reserved, and so are the
// heaps that glibc has for threads: the kernel may have made one mapping of both,
// and what begins the guest's memory is told by the kernel's command line in it.
func bootedMemory(pid int, size int64, cmdline string) ([]vmm.Region, error) {
	all, err := unreserved(pid)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	mem, err := os.Open("/proc/" + strconv.Itoa(pid) + "/mem")
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	defer mem.Close()
	for _, addr := range candidates(all, uint64(size)) {
		if isBooted(mem, addr, cmdline) {
			return []vmm.Region{{Addr: addr, Size: size}}, nil
		}
	}
	return nil, fmt.Errorf("find guest memory: none of %d mappings holds the kernel's command line", len(all))
}

// restoredMemory finds the memory of a guest that was loaded and did not run yet.
// It is of a file, or has a userfaultfd, and so a mapping of its own.
func restoredMemory(pid int, size int64) ([]vmm.Region, error) {
	all, err := unreserved(pid)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	all = slices.DeleteFunc(all, func(m mapping) bool { return m.to-m.from != uint64(size) })
	if len(all) != 1 {
		return nil, fmt.Errorf("find guest memory: %d mappings of %d bytes look like it, not one", len(all), size)
	}
	return []vmm.Region{{Addr: all[0].from, Size: size}}, nil
}

// mapping is a range of addresses.
type mapping struct{ from, to uint64 }

// candidates are where memory of a size may begin: at one end of a mapping or the
// other, with something else behind or before it.
func candidates(all []mapping, size uint64) []uint64 {
	var at []uint64
	for _, m := range all {
		switch n := m.to - m.from; {
		case n == size:
			at = append(at, m.from)
		case n > size:
			at = append(at, m.from, m.to-size)
		}
	}
	return at
}

// isBooted looks for the kernel's command line where Firecracker puts it, followed
// by what it appends. Linux leaves the first MiB alone for good.
func isBooted(mem io.ReaderAt, addr uint64, cmdline string) bool {
	const cmdlineStart = 0x20000
	b := make([]byte, len(cmdline))
	_, err := mem.ReadAt(b, int64(addr+cmdlineStart))
	return err == nil && string(b) == cmdline
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
		var errs [2]error
		cur.from, errs[0] = strconv.ParseUint(from, 16, 64)
		cur.to, errs[1] = strconv.ParseUint(to, 16, 64)
		if errors.Join(errs[:]...) != nil || cur.to < cur.from || len(fields) < 5 {
			return nil, fmt.Errorf("malformed mapping %.80q", s.Text())
		}
		private = fields[1] == "rw-p"
	}
	return all, s.Err()
}
