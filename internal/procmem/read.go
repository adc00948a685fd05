package procmem

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// ReadAt implements [io.ReaderAt]; the offset is an address. It reads all of b or fails. A page
// that a userfaultfd has to give is waited for, but not where process_vm_readv(2) is
// forbidden: /proc/PID/mem fails there instead (Linux 6.1: get_user_pages_remote without
// "locked" does not let a fault be tried again).
func (p *Process) ReadAt(b []byte, addr int64) (int, error) {
	switch {
	case p.mem == nil:
		return 0, errors.New("read memory: the process was opened for its pagemap alone")
	case len(b) == 0:
		return 0, nil
	}
	if err := p.read(b, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// read fills buf from pieces of memory, which are as long together. It uses remote up.
func (p *Process) read(buf []byte, remote []unix.RemoteIovec) error {
	err := p.readPieces(buf, remote)
	if err != nil {
		return fmt.Errorf("read memory of process %d: %w", p.pid, err)
	}
	return nil
}

func (p *Process) readPieces(buf []byte, remote []unix.RemoteIovec) error {
	for len(remote) > 0 && !p.slow.Load() {
		local := []unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}
		n, err := unix.ProcessVMReadv(p.pid, local, remote, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ESRCH):
			return ErrGone
		case errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM):
			// Not built in, or denied by a seccomp filter such as docker's, which
			// leaves /proc/PID/mem alone.
			p.slow.Store(true)
			continue
		case err != nil:
			return err
		case n == 0:
			return ErrGone
		}
		buf = buf[n:]
		remote = advance(remote, n)
	}
	for _, r := range remote {
		n, err := p.mem.ReadAt(buf[:r.Len], int64(r.Base))
		if errors.Is(err, io.EOF) {
			return ErrGone // mem_rw in fs/proc/base.c: the address space is gone
		}
		if err != nil {
			return fmt.Errorf("at %#x: %w", r.Base, err)
		}
		buf = buf[n:]
	}
	return nil
}

// advance returns what of an iovec remains after n bytes.
func advance(v []unix.RemoteIovec, n int) []unix.RemoteIovec {
	for n > 0 && n >= v[0].Len {
		n -= v[0].Len
		v = v[1:]
	}
	if n > 0 {
		v[0].Base += uintptr(n)
		v[0].Len -= n
	}
	return v
}
