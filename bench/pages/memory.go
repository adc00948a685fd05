//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver/pstest"
)

const (
	pageSize = pstest.PageSize
	// spare pages at the end of each memory file, which no order has: the last one is
	// touched to see that a clone is served.
	spare = 16
)

// memory is a snapshot's memory file, in which each page is unlike each other, but
// for the holes.
type memory struct {
	path  string
	pages int // spare ones included
	holes map[uint32]bool
	full  *os.File // a memfd with the same content, made when the kernel alone is to serve it
}

// newMemory makes a file of so many pages, and spare ones.
func newMemory(dir, name string, pages int, holes map[uint32]bool) (*memory, error) {
	m := &memory{path: filepath.Join(dir, name), pages: pages + spare, holes: holes}
	f, err := os.Create(m.path)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	defer f.Close()
	err = m.write(f)
	if err == nil {
		// What is not on disk yet cannot leave the page cache, and so would be measured
		// otherwise than a snapshot's file.
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	return m, nil
}

func (m *memory) size() int64 { return int64(m.pages) * pageSize }

// word is the first of a page.
func (m *memory) word(page uint32) uint64 {
	if m.holes[page] {
		return 0
	}
	return uint64(page+1) * 0x9e3779b97f4a7c15
}

func (m *memory) write(f *os.File) error {
	if err := f.Truncate(m.size()); err != nil {
		return err
	}
	const chunk = 64
	buf := make([]byte, chunk*pageSize)
	for first := 0; first < m.pages; first += chunk {
		n := min(chunk, m.pages-first)
		for i := range n {
			w := m.word(uint32(first + i))
			for at := 0; at < pageSize; at += 8 {
				binary.NativeEndian.PutUint64(buf[i*pageSize+at:], w+uint64(at))
			}
		}
		// Pages that are holes are not written, as in a snapshot.
		for i := 0; i < n; {
			end := i + 1
			for end < n && m.holes[uint32(first+end)] == m.holes[uint32(first+i)] {
				end++
			}
			if !m.holes[uint32(first+i)] {
				if _, err := f.WriteAt(buf[i*pageSize:end*pageSize], int64(first+i)*pageSize); err != nil {
					return err
				}
			}
			i = end
		}
	}
	return nil
}

// template returns the memfd that is full.
func (m *memory) template() (*os.File, error) {
	if m.full != nil {
		return m.full, nil
	}
	fd, err := unix.MemfdCreate("bench-full", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "full")
	// The kernel makes pages of zeros where it finds holes; here they are there.
	err = m.write(f)
	for p := range m.holes {
		if err == nil {
			_, err = f.WriteAt(make([]byte, pageSize), int64(p)*pageSize)
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("fill tmpfs file: %w", err)
	}
	m.full = f
	return f, nil
}

// backed makes sure that so many bytes of free memory are really there. Where this
// machine is a VM itself, its host may have taken them: each first use then costs
// several µs a page, as much as all that is measured, and whoever runs later pays less.
func backed(bytes int) error {
	mem, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	return os.NewSyscallError("munmap", unix.Munmap(mem))
}

// warm reads the file into the page cache: page servers drop what they need no more.
func (m *memory) warm() error {
	f, err := os.Open(m.path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < m.size(); off += int64(len(buf)) {
		n := min(int64(len(buf)), m.size()-off)
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return fmt.Errorf("read memory file: %w", err)
		}
	}
	return nil
}

func (m *memory) close() {
	if m.full != nil {
		m.full.Close()
	}
	_ = os.Remove(m.path)
}
