package qemu

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/qemu/qmp"
)

var hostAddress = regexp.MustCompile(`is (0x[0-9a-f]+)\s*$`)

// guestRegions finds the guest's memory inside QEMU: it is one mapping,
// whatever holes the guest's physical addresses have.
func guestRegions(ctx context.Context, c *qmp.Client, pid int, size int64) ([]vmm.Region, error) {
	var answer string
	if err := c.Do(ctx, "human-monitor-command", map[string]any{"command-line": "gpa2hva 0"}, &answer); err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	m := hostAddress.FindStringSubmatch(answer)
	if m == nil {
		return nil, fmt.Errorf("find guest memory: QEMU says %.80q", answer)
	}
	addr, err := strconv.ParseUint(m[1], 0, 64)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	maps, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	defer maps.Close()
	if err := checkMapped(maps, addr, uint64(size)); err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	return []vmm.Region{{Addr: addr, Size: size}}, nil
}

// checkMapped makes sure that a range is private, writable memory throughout,
// in lines of /proc/PID/maps (proc(5)).
func checkMapped(maps io.Reader, addr, size uint64) error {
	next := addr
	s := bufio.NewScanner(maps)
	for s.Scan() && next < addr+size {
		fields := strings.Fields(s.Text())
		if len(fields) < 2 {
			return fmt.Errorf("malformed mapping %.80q", s.Text())
		}
		var from, to uint64
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
			return fmt.Errorf("malformed mapping %.80q: %w", s.Text(), err)
		}
		if to <= next || from > next {
			continue
		}
		if fields[1] != "rw-p" {
			return fmt.Errorf("mapping %s is %s, not private memory", fields[0], fields[1])
		}
		next = to
	}
	if err := s.Err(); err != nil {
		return err
	}
	if next < addr+size {
		return fmt.Errorf("%d of %d bytes at %#x are mapped", next-addr, size, addr)
	}
	return nil
}
