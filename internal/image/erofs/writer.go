package erofs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

var le = binary.LittleEndian

const (
	blockBits   = 12
	blockSize   = 1 << blockBits
	slotBits    = 5 // inodes are numbered by slots of 32 bytes
	slotSize    = 1 << slotBits
	inodeSize   = 64 // an extended inode
	xattrHeader = 12
	// maxInline bounds the tail of a file that is stored beside its inode: a
	// small file then takes no block of its own, and its inode and its content
	// are read together.
	maxInline = blockSize / 2
)

// zeros is a block of them, a string so that nobody can change it.
var zeros = strings.Repeat("\x00", blockSize)

// Writer writes one file system. Content is appended first, then Finish writes
// everything else. It is not safe for concurrent use.
type Writer struct {
	out    *os.File
	buf    *bufio.Writer
	off    int64 // of the next byte in out
	tails  *os.File
	tailsW *bufio.Writer
	tail   int64 // size of tails
	err    error // sticky: out is then of no use
	// scratch is the memory of the last inode that was written.
	scratch []byte
}

// NewWriter starts a file system in out, an empty file. Small pieces of content
// are kept in spool, also an empty file, until Finish. The caller closes both,
// and syncs out.
func NewWriter(out, spool *os.File) *Writer {
	w := &Writer{out: out, tails: spool}
	w.buf = bufio.NewWriterSize(out, 256<<10)
	w.tailsW = bufio.NewWriterSize(spool, 64<<10)
	// Block 0 is the super block's; Finish writes it.
	w.err = w.pad(blockSize)
	return w
}

// Append stores the content of a regular file: size bytes of r. It must be told
// how large the attributes of the file's inode are at most; a map of the same
// attributes goes into the inode later.
func (w *Writer) Append(r io.Reader, size int64, xattrs map[string]string) (Data, error) {
	if w.err != nil {
		return Data{}, w.err
	}
	x, err := encodeXattrs(xattrs)
	if err != nil {
		return Data{}, err
	}
	d := Data{size: size}
	rest := size % blockSize
	d.inline = rest > 0 && rest <= maxInline && inodeSize+len(x)+int(rest) <= blockSize
	whole := size
	if d.inline {
		whole -= rest
	}
	if whole > 0 {
		if w.off>>blockBits > math.MaxUint32 {
			return Data{}, fmt.Errorf("store %d bytes: file system too large: %w", size, ErrFormat)
		}
		d.block = uint32(w.off >> blockBits)
		if err := w.copy(r, whole); err != nil {
			return Data{}, err
		}
	}
	if d.inline {
		d.tail = w.tail
		n, err := io.CopyN(w.tailsW, r, rest)
		w.tail += n
		if err != nil {
			return Data{}, short(err)
		}
	}
	return d, nil
}

// copy appends n bytes of r and pads to the next block. When r fails, what was
// written becomes dead space, so that the writer stays usable.
func (w *Writer) copy(r io.Reader, n int64) error {
	c, err := io.CopyN(w.buf, r, n)
	w.off += c
	if perr := w.pad(alignUp(w.off, blockSize) - w.off); perr != nil {
		w.err = perr
		return perr
	}
	if err != nil {
		return short(err)
	}
	return nil
}

// short turns the end of the input into an error that says so.
func short(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (w *Writer) pad(n int64) error {
	for n > 0 {
		c, err := w.buf.WriteString(zeros[:min(n, blockSize)])
		w.off += int64(c)
		n -= int64(c)
		if err != nil {
			return fmt.Errorf("write file system: %w", err)
		}
	}
	return nil
}

// Discard gives the blocks of content back to the disk. No inode may use the
// data any more. What the file says there is zero; that keeps the file system
// independent of whether the disk can make holes.
func (w *Writer) Discard(d Data) error {
	n := alignUp(d.size, blockSize)
	if d.inline {
		n -= blockSize
	}
	if n == 0 || w.err != nil {
		return w.err
	}
	if err := w.buf.Flush(); err != nil {
		w.err = fmt.Errorf("write file system: %w", err)
		return w.err
	}
	off := int64(d.block) << blockBits
	err := unix.Fallocate(int(w.out.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err == nil {
		return nil
	}
	// The disk can't make holes: overwrite.
	zero := make([]byte, 64<<10)
	for n > 0 {
		c, err := w.out.WriteAt(zero[:min(n, int64(len(zero)))], off)
		if err != nil {
			w.err = fmt.Errorf("write file system: %w", err)
			return w.err
		}
		off, n = off+int64(c), n-int64(c)
	}
	return nil
}

func alignUp[T int | int64 | uint64](n, to T) T { return (n + to - 1) &^ (to - 1) }
