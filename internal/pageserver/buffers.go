//go:build linux

package pageserver

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// newBuffers makes n buffers of size bytes, where pages are read to. They lie
// outside Go's heap, aligned as pages are, and are locked in memory: the kernel
// publishes a page of the template before it has all of it when its source has to be
// swapped in, in the middle of pwrite(2) (generic_perform_write and shmem_write_end).
func newBuffers(n, size int) ([][]byte, error) {
	var all [][]byte
	for range n {
		buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
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

func freeBuffers(all [][]byte) {
	for _, buf := range all {
		_ = unix.Munmap(buf)
	}
}
