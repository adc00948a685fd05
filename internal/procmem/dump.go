package procmem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
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
	// that most pages have not changed since: those are read back and not written
	// again. It is not faster while the disk keeps up, and it spares a paused VM
	// the disk when that does not.
	Compare bool
	// Workers that scan, read and write; 0 means 2.
	Workers int
}

// Result of Dump, in bytes.
type Result struct {
	// Private is what the process holds privately, Zero what of memory was seen to
	// be all zeros, Written what went into the file.
	Private, Zero, Written int64
}

// batch is how much is read at once; 1 MiB stays in the second-level cache
// between the read, the look for zeros and the write.
const batch = 1 << 20

// slice is how much of a region a worker takes at a time. Scanning is worth
// sharing as well: 40 ns for each page that is mapped, 20 ms for 2 GiB.
const slice = 16 << 20

// maxIov is the kernel's UIO_MAXIOV.
const maxIov = 1024

// Dump writes the pages that the process holds privately in regions to out, each
// at its region's offset. It does not sync. Pages that the process does not
// hold, or that it discarded (MADV_DONTNEED), keep what out has for them.
//
// The process should be paused; without, Dump still works and takes each page as
// it is at some moment.
func (p *Process) Dump(ctx context.Context, regions []vmm.Region, out *os.File, o Options) (Result, error) {
	if p.mem == nil {
		return Result{}, errors.New("dump memory: the process was opened for its pagemap alone")
	}
	workers := o.Workers
	if workers <= 0 {
		workers = 2
	}
	var work []vmm.Region
	for _, r := range regions {
		for ; r.Size > slice; r.Size -= slice {
			work = append(work, vmm.Region{Addr: r.Addr, Size: slice, Offset: r.Offset})
			r.Addr, r.Offset = r.Addr+slice, r.Offset+slice
		}
		work = append(work, r)
	}
	var (
		next  atomic.Int64
		parts = make([]dumper, workers)
	)
	g, ctx := errgroup.WithContext(ctx)
	for i := range parts {
		g.Go(func() error {
			d := &parts[i]
			*d = dumper{p: p, out: out, base: o.Base || o.Compare, chunk: newChunk()}
			if o.Compare {
				d.old = make([]byte, batch)
			}
			for {
				i := next.Add(1) - 1
				if i >= int64(len(work)) {
					return nil
				}
				if err := d.dump(ctx, work[i]); err != nil {
					return err
				}
			}
		})
	}
	err := g.Wait()
	var res Result
	for _, d := range parts {
		res.Private += d.res.Private
		res.Zero += d.res.Zero
		res.Written += d.res.Written
	}
	return res, err
}

// chunk is what one worker takes at once: pieces of memory, contiguous or not,
// of at most batch bytes.
type chunk struct {
	pieces []piece
	remote []unix.RemoteIovec
	// bytes of the pieces.
	bytes int
	buf   []byte
}

// piece is where a part of a chunk goes in the file.
type piece struct{ pos, len int64 }

func newChunk() *chunk {
	return &chunk{
		pieces: make([]piece, 0, maxIov),
		remote: make([]unix.RemoteIovec, 0, maxIov),
		buf:    make([]byte, batch),
	}
}

func (c *chunk) add(addr uint64, pos, n int64) {
	c.pieces = append(c.pieces, piece{pos, n})
	c.remote = append(c.remote, unix.RemoteIovec{Base: uintptr(addr), Len: int(n)})
	c.bytes += int(n)
}

func (c *chunk) full() bool { return c.bytes == batch || len(c.pieces) == maxIov }

func (c *chunk) reset() {
	c.pieces, c.remote, c.bytes = c.pieces[:0], c.remote[:0], 0
}

// dumper is one worker.
type dumper struct {
	p    *Process
	out  *os.File
	base bool
	res  Result
	// old is for what the file has, with Options.Compare; else nil.
	old []byte
	*chunk
}

// dump dumps a range.
func (d *dumper) dump(ctx context.Context, g vmm.Region) error {
	err := d.p.runs(g.Addr, g.Size, false, func(r Run, k Kind) error {
		if k == Zero {
			d.res.Zero += r.Len
			return d.punch(g.Offset+r.Offset, r.Len)
		}
		for r.Len > 0 {
			n := min(r.Len, int64(batch-d.bytes))
			d.add(g.Addr+uint64(r.Offset), g.Offset+r.Offset, n)
			r.Offset += n
			r.Len -= n
			if d.full() {
				if err := d.flush(ctx); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.flush(ctx)
}

// flush reads the chunk and writes it to the file.
func (d *dumper) flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	buf := d.buf[:d.bytes]
	if err := d.p.read(buf, d.remote); err != nil {
		return err
	}
	for _, piece := range d.pieces {
		if err := d.write(buf[:piece.len], piece.pos); err != nil {
			return fmt.Errorf("write memory file: %w", err)
		}
		buf = buf[piece.len:]
	}
	d.res.Private += int64(d.bytes)
	d.reset()
	return nil
}

// What to do with a page of the file.
const (
	pageKeep = iota
	pageHole
	pageData
)

// write puts b into the file at pos, in as few calls as runs of pages that are
// alike allow.
func (d *dumper) write(b []byte, pos int64) error {
	var old []byte
	if d.old != nil {
		old = d.old[:len(b)]
		if _, err := d.out.ReadAt(old, pos); err != nil {
			return err
		}
	}
	page := os.Getpagesize()
	start, kind := 0, d.kind(b, old, 0)
	for i := page; i <= len(b); i += page {
		next := kind
		if i < len(b) {
			if next = d.kind(b, old, i); next == kind {
				continue
			}
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
				return err
			}
		}
		start, kind = i, next
	}
	return nil
}

// kind tells what to do with the page at b[i:], and counts it when it is zero.
func (d *dumper) kind(b, old []byte, i int) int {
	end := i + os.Getpagesize()
	zero := bytes.Equal(b[i:end], zeros[:end-i])
	if zero {
		d.res.Zero += int64(end - i)
	}
	switch {
	case old != nil && bytes.Equal(b[i:end], old[i:end]):
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
	if !d.base {
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
			return err
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
