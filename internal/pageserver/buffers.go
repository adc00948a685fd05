//go:build linux

package pageserver

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// maxBuffers bounds how many faults are read for at the same time.
const maxBuffers = 8

// buffers are where pages are read to. They lie outside Go's heap and are locked
// in memory: the kernel publishes a page of the template before it has all of
// it when its source has to be swapped in, in the middle of pwrite(2)
// (generic_perform_write and shmem_write_end).
type buffers struct {
	free chan []byte
	all  [][]byte
}

// newBuffers makes as many as may be locked, at least one.
func newBuffers(size int) (*buffers, error) {
	b := &buffers{free: make(chan []byte, maxBuffers)}
	for range maxBuffers {
		buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err == nil {
			b.all = append(b.all, buf)
			err = unix.Mlock(buf)
		}
		if err != nil && len(b.free) > 0 {
			break
		}
		if err != nil {
			b.close()
			return nil, fmt.Errorf("lock a buffer of %d bytes in memory: %w; raise the limit (ulimit -l)", size, err)
		}
		b.free <- buf
	}
	return b, nil
}

func (b *buffers) get() []byte { return <-b.free }

// tryGet returns nil when all are in use.
func (b *buffers) tryGet() []byte {
	select {
	case buf := <-b.free:
		return buf
	default:
		return nil
	}
}

func (b *buffers) put(buf []byte) { b.free <- buf[:cap(buf)] }

// close must follow the last put.
func (b *buffers) close() {
	for _, buf := range b.all {
		_ = unix.Munmap(buf)
	}
	b.all = nil
}
