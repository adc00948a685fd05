//go:build linux

package pageserver

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// fillers is how many fill the template at the same time.
const fillers = 16

// newBuffers makes n buffers of size bytes, where pages are read to that go into the
// template. They are locked in memory: the kernel publishes a page of the template before
// it has all of it when its source has to be swapped in, in the middle of pwrite(2)
// (generic_perform_write and shmem_write_end).
func newBuffers(n, size int) ([][]byte, error) {
	var all [][]byte
	for range n {
		buf, err := newBuffer(size)
		if err == nil {
			all = append(all, buf)
			err = unix.Mlock(buf)
		}
		if err != nil {
			freeBuffers(all)
			return nil, fmt.Errorf("lock a buffer of %d bytes in memory: %w; raise the limit (ulimit -l)", size, err)
		}
	}
	return all, nil
}

// newBuffer makes one that is not locked. It lies outside Go's heap, aligned as pages
// are, and takes memory as far as it is used.
func newBuffer(size int) ([]byte, error) {
	return unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

func freeBuffers(all [][]byte) {
	for _, buf := range all {
		_ = unix.Munmap(buf)
	}
}
