package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"sort"
)

// dirBlock is one block of a directory's entries.
type dirBlock struct {
	entries []Entry
	size    int // bytes used
}

const (
	magic          = 0xe0f5e1e2
	superOffset    = 1024
	direntSize     = 12
	compatChecksum = 1 << 0 // SB_CHKSUM
	compatMTime    = 1 << 1 // the time in an extended inode is the mtime
	layoutPlain    = 0
	layoutInline   = 2
	maxDepth       = 4096 // of directories: a path holds no more
)

// Finish writes the tree below root, a directory, and returns the size of the
// file system in bytes, a multiple of the block size. Equal calls give equal
// bytes. The writer is of no use afterwards.
func (w *Writer) Finish(root *Inode) (int64, error) {
	if w.err != nil {
		return 0, w.err
	}
	w.err = errors.New("file system is finished")
	if root.Mode&ModeType != ModeDir {
		return 0, fmt.Errorf("store root: %w", ErrFormat)
	}
	if err := w.tailsW.Flush(); err != nil {
		return 0, fmt.Errorf("write file system: %w", err)
	}
	t := &tree{}
	if err := t.collect(root, root, 0); err != nil {
		return 0, err
	}
	// Directories and long links that don't fit beside their inodes come
	// between the files' data and the metadata; their sizes are known by now,
	// but not yet the inodes' numbers that directories contain.
	blocks := uint64(w.off) >> blockBits
	for _, n := range t.order {
		blocks += t.place(n, blocks)
	}
	metaBlock := blocks
	end := t.number(metaBlock << blockBits)
	blocks = alignUp(end, blockSize) >> blockBits
	if blocks > math.MaxUint32 {
		return 0, fmt.Errorf("store %d blocks: file system too large: %w", blocks, ErrFormat)
	}
	for _, n := range t.order {
		if err := w.writeBlocks(n); err != nil {
			return 0, err
		}
	}
	for _, n := range t.order {
		if err := w.writeInode(n, metaBlock); err != nil {
			return 0, err
		}
	}
	if err := w.pad(int64(blocks<<blockBits) - w.off); err != nil {
		return 0, err
	}
	if err := w.buf.Flush(); err != nil {
		return 0, fmt.Errorf("write file system: %w", err)
	}
	return w.off, w.writeSuper(root, len(t.order), uint32(blocks), uint32(metaBlock))
}

// tree is all inodes in the order in which they are stored: depth first, so
// that what is read together lies together.
type tree struct {
	order  []*Inode
	parent []*Inode // of directories, by Inode.lay.number
}

func (t *tree) collect(n, parent *Inode, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("store tree deeper than %d: %w", maxDepth, ErrFormat)
	}
	n.lay.links++
	if n.lay.seen {
		if n.Mode&ModeType == ModeDir {
			return fmt.Errorf("store hard link to a directory: %w", ErrFormat)
		}
		return nil
	}
	x, err := encodeXattrs(n.Xattrs)
	if err != nil {
		return err
	}
	n.lay.seen, n.lay.xattrs = true, x
	n.lay.number = uint32(len(t.order) + 1)
	t.order = append(t.order, n)
	t.parent = append(t.parent, parent)
	switch n.Mode & ModeType {
	case ModeDir:
		n.lay.links++ // its own "."
		if err := t.collectDir(n, parent, depth); err != nil {
			return err
		}
	case ModeFile:
		n.lay.size, n.lay.block = uint64(n.Data.size), n.Data.block
		if n.Data.inline {
			n.lay.inline = int(n.Data.size % blockSize)
		}
		if n.lay.inline > 0 && inodeSize+len(x)+n.lay.inline > blockSize {
			return fmt.Errorf("store attributes that Append was not told of: %w", ErrFormat)
		}
	case ModeLink:
		if n.Target == "" || len(n.Target) > MaxTarget {
			return fmt.Errorf("store link to %.40q: %w", n.Target, ErrFormat)
		}
		n.lay.size = uint64(len(n.Target))
	case ModeChar, ModeBlock:
		if n.Major >= 1<<12 || n.Minor >= 1<<20 {
			return fmt.Errorf("store device %d:%d: %w", n.Major, n.Minor, ErrFormat)
		}
	case ModeFifo, ModeSocket:
	default:
		return fmt.Errorf("store file of mode %#o: %w", n.Mode, ErrFormat)
	}
	return nil
}

// collectDir sorts the entries as the kernel's binary search wants them, "."
// and ".." among them, and cuts them into blocks.
func (t *tree) collectDir(n, parent *Inode, depth int) error {
	all := make([]Entry, 0, len(n.Entries)+2)
	all = append(all, Entry{".", n}, Entry{"..", parent})
	for _, e := range n.Entries {
		if err := checkName(e.Name); err != nil {
			return err
		}
		all = append(all, e)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	var b dirBlock
	for i, e := range all {
		if i > 0 && all[i-1].Name == e.Name {
			return fmt.Errorf("store name %.40q twice: %w", e.Name, ErrFormat)
		}
		need := direntSize + len(e.Name)
		if b.size+need > blockSize {
			n.lay.dir = append(n.lay.dir, b)
			b = dirBlock{}
		}
		b.entries = append(b.entries, e)
		b.size += need
	}
	n.lay.dir = append(n.lay.dir, b)
	n.lay.size = uint64(len(n.lay.dir)-1)*blockSize + uint64(b.size)
	for _, e := range all {
		if e.Name == "." || e.Name == ".." {
			continue
		}
		if e.Inode.Mode&ModeType == ModeDir {
			n.lay.links++ // the child's ".."
		}
		if err := t.collect(e.Inode, n, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// place decides where a directory or a link keeps its content, and returns how
// many blocks from first on it takes.
func (t *tree) place(n *Inode, first uint64) uint64 {
	typ := n.Mode & ModeType
	if typ != ModeDir && typ != ModeLink {
		return 0
	}
	size := n.lay.size
	if rest := int(size % blockSize); rest > 0 && inodeSize+len(n.lay.xattrs)+rest <= blockSize {
		n.lay.inline = rest
		size -= uint64(rest)
	}
	if size > 0 {
		n.lay.block = uint32(first)
	}
	return alignUp(size, blockSize) >> blockBits
}

// number gives every inode its place from byte start on, and returns the end.
// What is stored beside an inode must not cross a block; nor must the inode.
func (t *tree) number(start uint64) uint64 {
	off := start
	for _, n := range t.order {
		off = alignUp(off, slotSize)
		head := uint64(inodeSize + len(n.lay.xattrs))
		total := head + uint64(n.lay.inline)
		if n.lay.inline > 0 && total <= blockSize && off%blockSize+total > blockSize {
			off = alignUp(off, blockSize)
		}
		if off%blockSize+inodeSize > blockSize {
			off = alignUp(off, blockSize)
		}
		n.lay.nid = (off - start) >> slotBits
		off += total
	}
	return off
}

// writeBlocks writes the content that place put into blocks.
func (w *Writer) writeBlocks(n *Inode) error {
	typ := n.Mode & ModeType
	whole := n.lay.size - uint64(n.lay.inline)
	if whole == 0 || (typ != ModeDir && typ != ModeLink) {
		return nil
	}
	return w.copy(bytes.NewReader(n.content()[:whole]), int64(whole))
}

// content of a directory or a link.
func (n *Inode) content() []byte {
	if n.Mode&ModeType == ModeLink {
		return []byte(n.Target)
	}
	out := make([]byte, 0, n.lay.size)
	for _, b := range n.lay.dir {
		out = append(out, zeros[:alignUp(len(out), blockSize)-len(out)]...)
		name := len(b.entries) * direntSize
		for _, e := range b.entries {
			out = le.AppendUint64(out, e.Inode.lay.nid)
			out = le.AppendUint16(out, uint16(name))
			out = append(out, fileType(e.Inode.Mode), 0)
			name += len(e.Name)
		}
		for _, e := range b.entries {
			out = append(out, e.Name...)
		}
	}
	return out
}

// fileType is the type as directory entries have it (EROFS_FT_*).
func fileType(mode uint16) uint8 {
	switch mode & ModeType {
	case ModeFile:
		return 1
	case ModeDir:
		return 2
	case ModeChar:
		return 3
	case ModeBlock:
		return 4
	case ModeFifo:
		return 5
	case ModeSocket:
		return 6
	case ModeLink:
		return 7
	}
	return 0
}

// writeInode writes the inode and what is stored beside it.
func (w *Writer) writeInode(n *Inode, metaBlock uint64) error {
	off := int64(metaBlock<<blockBits + n.lay.nid<<slotBits)
	if err := w.pad(off - w.off); err != nil {
		return err
	}
	layout := uint16(layoutPlain)
	if n.lay.inline > 0 {
		layout = layoutInline
	}
	union := n.lay.block
	if t := n.Mode & ModeType; t == ModeChar || t == ModeBlock {
		// As new_encode_dev in the kernel.
		union = n.Minor&0xff | n.Major<<8 | (n.Minor&^0xff)<<12
	}
	icount := uint16(0)
	if len(n.lay.xattrs) > 0 {
		icount = uint16((len(n.lay.xattrs)-xattrHeader)/4 + 1)
	}
	b := w.scratch[:0]
	b = le.AppendUint16(b, 1|layout<<1) // 1: extended
	b = le.AppendUint16(b, icount)
	b = le.AppendUint16(b, n.Mode)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, n.lay.size)
	b = le.AppendUint32(b, union)
	b = le.AppendUint32(b, n.lay.number)
	b = le.AppendUint32(b, n.UID)
	b = le.AppendUint32(b, n.GID)
	b = le.AppendUint64(b, uint64(n.MTime.Unix()))
	b = le.AppendUint32(b, uint32(n.MTime.Nanosecond()))
	b = le.AppendUint32(b, n.lay.links)
	b = append(b, zeros[:inodeSize-len(b)]...)
	b = append(b, n.lay.xattrs...)
	if n.lay.inline > 0 {
		tail, err := w.inline(n)
		if err != nil {
			return err
		}
		b = append(b, tail...)
	}
	w.scratch = b
	c, err := w.buf.Write(b)
	w.off += int64(c)
	if err != nil {
		return fmt.Errorf("write file system: %w", err)
	}
	return nil
}

func (w *Writer) inline(n *Inode) ([]byte, error) {
	if n.Mode&ModeType != ModeFile {
		c := n.content()
		return c[len(c)-n.lay.inline:], nil
	}
	b := make([]byte, n.lay.inline)
	if _, err := w.tails.ReadAt(b, n.Data.tail); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read back content: %w", err)
	}
	return b, nil
}

// writeSuper writes the super block. There is no build time and no UUID: the
// same tree gives the same bytes.
func (w *Writer) writeSuper(root *Inode, inodes int, blocks, metaBlock uint32) error {
	b := make([]byte, blockSize-superOffset)
	le.PutUint32(b[0:], magic)
	le.PutUint32(b[8:], compatChecksum|compatMTime)
	b[12] = blockBits
	le.PutUint16(b[14:], uint16(root.lay.nid))
	le.PutUint64(b[16:], uint64(inodes))
	le.PutUint32(b[36:], blocks)
	le.PutUint32(b[40:], metaBlock)
	// The kernel's crc32c does not invert its result; Go's does.
	le.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	if _, err := w.out.WriteAt(b, superOffset); err != nil {
		return fmt.Errorf("write file system: %w", err)
	}
	return nil
}
