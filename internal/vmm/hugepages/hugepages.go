// Package hugepages tells of the machine's huge pages of 2 MiB, of which a guest's
// memory may be (hugetlbfs; Documentation/admin-guide/mm/hugetlbpage.rst in Linux).
package hugepages

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Size of a huge page in bytes, on x86-64.
const Size = 2 << 20

// Dir is where the kernel tells of them, below the root.
const Dir = "sys/kernel/mm/hugepages/hugepages-2048kB"

// Pool is what the kernel keeps of huge pages, in pages.
type Pool struct {
	// Total is the pool's size.
	Total int
	// Free are those that nobody has, and nobody was promised.
	Free int
}

// ErrNone means that the kernel has no huge pages of this size.
var ErrNone = errors.New("this kernel has no huge pages of 2 MiB")

// Read reads the pool of the machine whose /sys is below root. The error wraps [ErrNone].
func Read(root string) (Pool, error) {
	var n [3]int
	for i, name := range []string{"nr_hugepages", "free_hugepages", "resv_hugepages"} {
		b, err := os.ReadFile(filepath.Join(root, Dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return Pool{}, ErrNone
		}
		if err == nil {
			n[i], err = strconv.Atoi(strings.TrimSpace(string(b)))
		}
		if err != nil {
			return Pool{}, fmt.Errorf("read the number of huge pages: %w", err)
		}
	}
	return Pool{Total: n[0], Free: max(0, n[1]-n[2])}, nil
}

// Need returns an error unless so many pages are free. It is a look, no promise: VMMs
// take pages from the pool when they touch them (MAP_NORESERVE), and one that finds none is
// killed. The error has the line to type that makes so many free, as far as there is memory.
func (p Pool) Need(pages int) error {
	if p.Free >= pages {
		return nil
	}
	return fmt.Errorf("%d huge pages of 2 MiB are free, and %d are needed: as root, `sysctl -w vm.nr_hugepages=%d`", p.Free, pages, p.Total-p.Free+pages)
}
