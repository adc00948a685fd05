package procmem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm"
)

// Options of Dump.
type Options struct {
	// Base says that the file holds something already: the parent's memory. Pages
	// that are zero in the process then become holes there; without Base they are
	// holes already and are left alone.
	Base bool
	// Compare says that an earlier Dump of the same process went into the file, and
	// that most pages will not have changed since: those are not written again.
	Compare bool
	// Workers that read and write; 0 means 2.
	Workers int
}

// Result of Dump, in bytes.
type Result struct {
	// Private is what the process holds privately, Zero the part of it that was
	// all zeros, Written what went into the file.
	Private, Zero, Written int64
}

// batch is how much is read at once; 1 MiB stays in the second-level cache
// between the read, the look for zeros and the write.
const batch = 1 << 20

// maxIov is the kernel's UIO_MAXIOV.
const maxIov = 1024

// Dump writes the pages that the process holds privately in regions to out, each
// at its region's offset. It does not sync. Pages that the process does not
// hold, or that it discarded (MADV_DONTNEED), keep what out has for them.
//
// The process should be paused; without, Dump still works and takes each page as
// it is at some moment.
func (p *Process) Dump(ctx context.Context, regions []vmm.Region, out *os.File, o Options) (Result, error) {
	workers := o.Workers
	if workers <= 0 {
		workers = 2
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg    sync.WaitGroup
		full  = make(chan *chunk)
		free  = make(chan *chunk, workers+1)
		parts = make([]dumper, workers)
		errs  = make([]error, workers+1)
	)
	for range workers + 1 {
		free <- newChunk()
	}
	for i := range workers {
		wg.Go(func() {
			d := &parts[i]
			*d = dumper{p: p, out: out, opt: o, slow: p.noVMRead}
			for c := range full {
				if errs[i] == nil {
					if errs[i] = d.dump(c); errs[i] != nil {
						cancel() // so that the scan stops feeding
					}
				}
				c.reset()
				free <- c
			}
		})
	}
	errs[workers] = p.feed(ctx, regions, free, full)
	close(full)
	wg.Wait()
	var res Result
	for _, d := range parts {
		res.Private += d.res.Private
		res.Zero += d.res.Zero
		res.Written += d.res.Written
	}
	// What a worker met is the cause; that the scan was then cancelled is not.
	if err := errors.Join(errs[:workers]...); err != nil {
		return res, err
	}
	return res, errs[workers]
}

// feed scans the regions and sends chunks of at most batch bytes.
func (p *Process) feed(ctx context.Context, regions []vmm.Region, free <-chan *chunk, full chan<- *chunk) error {
	cur := <-free
	flush := func() error {
		select {
		case full <- cur:
		case <-ctx.Done():
			return ctx.Err()
		}
		// Workers always give their chunk back.
		cur = <-free
		return nil
	}
	for _, g := range regions {
		err := p.runs(g.Addr, g.Size, func(r run) error {
			for r.Len > 0 {
				n := r.Len
				if !r.zero {
					n = min(n, int64(batch-cur.bytes))
				}
				cur.add(g.Addr+uint64(r.Offset), g.Offset+r.Offset, n, r.zero)
				r.Offset += n
				r.Len -= n
				if cur.full() {
					if err := flush(); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if len(cur.pieces) > 0 {
		return flush()
	}
	return nil
}

// chunk is what one worker takes at once: pieces of memory, contiguous or not,
// of at most batch bytes.
type chunk struct {
	pieces []piece
	remote []unix.RemoteIovec
	// bytes of the pieces that are to be read.
	bytes int
	buf   []byte
	old   []byte // what the file has, with Compare
}

type piece struct {
	addr uint64
	// pos in the file.
	pos, len int64
	// zero tells that the pages are the kernel's zero page; they are not read.
	zero bool
}

func newChunk() *chunk {
	return &chunk{
		pieces: make([]piece, 0, maxIov),
		remote: make([]unix.RemoteIovec, 0, maxIov),
		buf:    make([]byte, batch),
	}
}

func (c *chunk) add(addr uint64, pos, n int64, zero bool) {
	c.pieces = append(c.pieces, piece{addr, pos, n, zero})
	if !zero {
		c.remote = append(c.remote, unix.RemoteIovec{Base: uintptr(addr), Len: int(n)})
		c.bytes += int(n)
	}
}

func (c *chunk) full() bool { return c.bytes == batch || len(c.pieces) == maxIov }

func (c *chunk) reset() {
	c.pieces, c.remote, c.bytes = c.pieces[:0], c.remote[:0], 0
}

// dumper is one worker.
type dumper struct {
	p   *Process
	out *os.File
	opt Options
	res Result
	// slow tells that process_vm_readv is not allowed here.
	slow bool
}

func (d *dumper) dump(c *chunk) error {
	if err := d.read(c); err != nil {
		return fmt.Errorf("read memory of process %d: %w", d.p.pid, err)
	}
	buf := c.buf[:c.bytes]
	for _, piece := range c.pieces {
		if piece.zero {
			d.res.Zero += piece.len
			if err := d.punch(piece.pos, piece.len); err != nil {
				return err
			}
			continue
		}
		b := buf[:piece.len]
		buf = buf[piece.len:]
		d.res.Private += piece.len
		if err := d.write(c, b, piece.pos); err != nil {
			return err
		}
	}
	return nil
}

// read fills the chunk's buffer.
func (d *dumper) read(c *chunk) error {
	if c.bytes == 0 {
		return nil
	}
	buf := c.buf[:c.bytes]
	remote := c.remote
	for len(remote) > 0 && !d.slow {
		local := []unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}
		n, err := unix.ProcessVMReadv(d.p.pid, local, remote, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ESRCH):
			return ErrGone
		case errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM):
			// Not built in, or denied by a seccomp filter such as docker's, which
			// leaves /proc/PID/mem alone.
			d.slow = true
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
		n, err := d.p.mem.ReadAt(buf[:r.Len], int64(r.Base))
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

// What to do with a page of the file.
const (
	pageKeep = iota
	pageHole
	pageData
	pageEnd // no page: the end of the buffer
)

// write puts b into the file at pos, in as few calls as runs of zero pages and
// of equal pages allow.
func (d *dumper) write(c *chunk, b []byte, pos int64) error {
	var old []byte
	if d.opt.Compare {
		if c.old == nil {
			c.old = make([]byte, batch)
		}
		old = c.old[:len(b)]
		if _, err := d.out.ReadAt(old, pos); err != nil {
			return fmt.Errorf("read back memory file: %w", err)
		}
	}
	page := os.Getpagesize()
	start, kind := 0, d.kind(b, old, 0, page)
	for i := page; i <= len(b); i += page {
		next := d.kind(b, old, i, page)
		if next == kind {
			continue
		}
		switch kind {
		case pageHole:
			if err := d.punch(pos+int64(start), int64(i-start)); err != nil {
				return err
			}
		case pageData:
			n, err := d.out.WriteAt(b[start:i], pos+int64(start))
			d.res.Written += int64(n)
			if err != nil {
				return fmt.Errorf("write memory file: %w", err)
			}
		}
		start, kind = i, next
	}
	return nil
}

// kind tells what to do with the page at b[i:], and counts it when it is zero.
func (d *dumper) kind(b, old []byte, i, page int) int {
	if i == len(b) {
		return pageEnd
	}
	p := b[i : i+page]
	zero := bytes.Equal(p, zeros[:page])
	if zero {
		d.res.Zero += int64(page)
	}
	switch {
	case old != nil && bytes.Equal(p, old[i:i+page]):
		return pageKeep
	case zero:
		return pageHole
	}
	return pageData
}

// zeros is what others are compared with, and as large as any page. It is never
// written.
var zeros [64 << 10]byte

// punch makes n bytes of the file at pos read as zeros.
func (d *dumper) punch(pos, n int64) error {
	if !d.opt.Base && !d.opt.Compare {
		return nil // the file is a hole there
	}
	fd := int(d.out.Fd())
	// Most zero pages are zero in the parent as well, and looking is cheaper than
	// a change of the file's extents. SEEK_DATA moves the file's position, which
	// nobody uses.
	for end := pos + n; pos < end; {
		data, err := unix.Seek(fd, pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			return nil
		}
		stop := end
		if err == nil {
			pos = max(pos, data)
			if hole, err := unix.Seek(fd, pos, unix.SEEK_HOLE); err == nil && hole > pos {
				stop = min(end, hole)
			}
		}
		if err := d.erase(pos, stop-pos); err != nil {
			return fmt.Errorf("write memory file: %w", err)
		}
		pos = stop
	}
	return nil
}

func (d *dumper) erase(pos, n int64) error {
	err := unix.Fallocate(int(d.out.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, pos, n)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for n > 0 {
		w, err := d.out.WriteAt(zeros[:min(n, int64(len(zeros)))], pos)
		if err != nil {
			return err
		}
		pos, n = pos+int64(w), n-int64(w)
	}
	return nil
}
