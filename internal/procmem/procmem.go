// Package procmem reads memory of another process: which pages it holds
// privately, and what is in them. With it a snapshot takes just what a VM
// changed.
//
// It needs the right to ptrace the process (ptrace(2), "ptrace access mode
// checking"): the same user, and with Yama's ptrace_scope 1 an ancestor.
// Nothing here stops the process; whoever wants one moment's memory pauses it
// before.
package procmem

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrGone means that the process has ended.
var ErrGone = errors.New("process has ended")

// Process is an open process. Its methods may be called concurrently.
type Process struct {
	pid     int
	pagemap *os.File
	mem     *os.File // nil of OpenPagemap
	// scan tells that the kernel has PAGEMAP_SCAN.
	scan bool
	// slow tells that process_vm_readv is not allowed here: /proc/PID/mem is read.
	slow atomic.Bool
}

// Open opens the process pid. The caller makes sure that it is the right one
// (a pidfd that is still open does), and closes it.
func Open(pid int) (*Process, error) {
	p, err := OpenPagemap(pid)
	if err != nil {
		return nil, err
	}
	if p.mem, err = openProc(pid, "mem"); err != nil {
		p.pagemap.Close()
		return nil, err
	}
	return p, nil
}

// OpenPagemap is Open for who asks for pages and not for what is in them: Dump and
// ReadAt fail. The kernel then wants only the right to read /proc/PID/smaps, which
// Yama leaves alone.
func OpenPagemap(pid int) (*Process, error) {
	pagemap, err := openProc(pid, "pagemap")
	if err != nil {
		return nil, err
	}
	p := &Process{pid: pid, pagemap: pagemap}
	// An empty range is a valid request, so this fails only where the ioctl is
	// not known: before Linux 6.7 with ENOTTY.
	_, err = p.pagemapScan(&scanArg{categoryAnyofMask: pageIsPresent, returnMask: pageIsPresent})
	p.scan = err == nil
	return p, nil
}

func openProc(pid int, name string) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("read memory of process %d: %w", pid, ErrGone)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("read memory of process %d: %w; allow ptrace: sysctl kernel.yama.ptrace_scope=0", pid, err)
	case err != nil:
		return nil, fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	return f, nil
}

// Close closes the process. It does not end it.
func (p *Process) Close() error {
	err := p.pagemap.Close()
	if p.mem != nil {
		err = errors.Join(err, p.mem.Close())
	}
	return err
}

// Private calls yield for each run of pages in [addr, addr+size) that the
// process holds privately, in ascending order, until yield returns an error,
// which it then returns. Private means: present or swapped out, and not backed
// by a file or shared memory. Pages that are the kernel's zero page are no
// part of it where the kernel tells them apart (Linux 6.7), see [Process.Dump].
func (p *Process) Private(addr uint64, size int64, yield func(Run) error) error {
	return p.runs(addr, size, false, func(r Run, k Kind) error {
		if k != Private {
			return nil
		}
		return yield(r)
	})
}

// Kind is how a process has a page.
type Kind uint8

// The kinds of pages.
const (
	// Private pages are the process's own, see [Process.Private].
	Private Kind = iota
	// Zero is the kernel's zero page.
	Zero
	// File pages are mapped from a file or shared memory, unchanged.
	File
)

// Pages calls yield for each run of pages of one kind in [addr, addr+size), in
// ascending order, until yield returns an error, which it then returns. What is
// between the runs is not in the process's page tables: it was never touched, or
// it was discarded. Before Linux 6.7 the zero page passes for a private one.
func (p *Process) Pages(addr uint64, size int64, yield func(Run, Kind) error) error {
	return p.runs(addr, size, true, yield)
}

// PrivateBytes is the sum of what Private yields.
func (p *Process) PrivateBytes(addr uint64, size int64) (int64, error) {
	var n int64
	err := p.Private(addr, size, func(r Run) error {
		n += r.Len
		return nil
	})
	return n, err
}

// Run is a run of pages, in bytes relative to the start of the range that was
// asked for.
type Run struct {
	Offset, Len int64
}

// runs is Pages, with those of files only where these are wanted: the kernel then
// passes over the others, of which there may be many.
func (p *Process) runs(addr uint64, size int64, files bool, yield func(Run, Kind) error) error {
	page := uint64(os.Getpagesize())
	if addr%page != 0 || size < 0 || uint64(size)%page != 0 {
		return fmt.Errorf("scan memory of process %d: %d bytes at %#x are not whole pages", p.pid, size, addr)
	}
	if size == 0 {
		return nil
	}
	if !p.scan {
		return p.pagemapRuns(addr, uint64(size), files, yield)
	}
	if err := p.scanRuns(addr, uint64(size), files, yield); err != nil {
		return err
	}
	// The address space of a process that has ended is empty, and PAGEMAP_SCAN
	// finds nothing wrong with that. A read gets an end of file.
	if _, err := p.pagemap.ReadAt(make([]byte, 8), int64(addr/page*8)); err != nil {
		return fmt.Errorf("scan memory of process %d: %w", p.pid, ErrGone)
	}
	return nil
}
