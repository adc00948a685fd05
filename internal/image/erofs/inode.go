// Package erofs writes uncompressed EROFS file systems: the read-only root file
// systems of VMs. The format is that of Linux's fs/erofs/erofs_fs.h with
// features that every kernel since 5.4 mounts.
//
// It exists because container images need hard links, and because file content
// should be written once, while the archive is being read and before the tree
// is known: so data comes first in the image and metadata last. The writer of
// github.com/erofs/go-erofs (v0.3) gives every path an inode of its own and
// wants the tree before the data; its reader checks this package in tests.
package erofs

import (
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"
)

// Limits of the format, or of the kernel that mounts it.
const (
	MaxName   = 255  // bytes in the name of a directory entry
	MaxTarget = 4095 // bytes in the target of a symbolic link
	// MaxXattrs bounds the encoded attributes of one inode, in bytes.
	MaxXattrs = 64 << 10
)

// File types, the S_IFMT bits of a mode (inode(7)).
const (
	ModeType   = 0o170000
	ModeFifo   = 0o010000
	ModeChar   = 0o020000
	ModeDir    = 0o040000
	ModeBlock  = 0o060000
	ModeFile   = 0o100000
	ModeLink   = 0o120000
	ModeSocket = 0o140000
)

// ErrFormat means that something can't be expressed in EROFS.
var ErrFormat = errors.New("not possible in EROFS")

// Inode is a file of any type. An inode that several entries name is one file
// with several hard links.
type Inode struct {
	Mode   uint16 // type and permissions
	UID    uint32
	GID    uint32
	MTime  time.Time
	Major  uint32 // of a device
	Minor  uint32
	Target string // of a symbolic link
	// Xattrs by their full names. Names outside of the namespaces user, trusted,
	// security and the POSIX ACLs can't be stored; see KnownXattr.
	Xattrs map[string]string
	// Data of a regular file, from Writer.Append.
	Data Data
	// Entries of a directory, in any order, without "." and "..".
	Entries []Entry

	lay layout
}

// Entry is a name in a directory.
type Entry struct {
	Name  string
	Inode *Inode
}

// Data is the content of a regular file: whole blocks in the data area, and
// perhaps a tail that is stored beside the inode.
type Data struct {
	size  int64
	block uint32 // first block, when there is a whole one
	tail  int64  // offset in the spool of tails
	// inline says that the last, partial block is in the spool.
	inline bool
}

// Size in bytes.
func (d Data) Size() int64 { return d.size }

// layout is what Finish decides about an inode.
type layout struct {
	seen   bool
	number uint32 // what stat calls st_ino on 32-bit systems
	nid    uint64
	links  uint32
	size   uint64
	block  uint32
	inline int // bytes stored after the inode
	dir    []dirBlock
	xattrs []byte
}

// xattrPrefixes are the namespaces that the kernel knows by number
// (EROFS_XATTR_INDEX_*).
var xattrPrefixes = [...]struct {
	prefix string
	index  uint8
	whole  bool // the prefix is the whole name
}{
	{"user.", 1, false},
	{"system.posix_acl_access", 2, true},
	{"system.posix_acl_default", 3, true},
	{"trusted.", 4, false},
	{"security.", 6, false},
}

// splitXattr returns the index of the name's namespace and the rest of the name.
func splitXattr(name string) (index uint8, rest string, ok bool) {
	for _, p := range xattrPrefixes {
		rest, found := strings.CutPrefix(name, p.prefix)
		if found && p.whole == (rest == "") {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// KnownXattr says whether an attribute of this name can be stored.
func KnownXattr(name string) bool {
	_, _, ok := splitXattr(name)
	return ok
}

// encodeXattrs returns what follows the inode: a header of 12 bytes and one
// entry per attribute, each padded to 4 bytes. Nothing is shared between
// inodes: attributes are rare in container images.
func encodeXattrs(attrs map[string]string) ([]byte, error) {
	if len(attrs) == 0 {
		return nil, nil
	}
	names := make([]string, 0, len(attrs))
	for n := range attrs {
		names = append(names, n)
	}
	sort.Strings(names)
	b := make([]byte, xattrHeader)
	for _, n := range names {
		index, rest, ok := splitXattr(n)
		if !ok || len(rest) > 255 || len(attrs[n]) > 0xffff {
			return nil, fmt.Errorf("store attribute %.40q: %w", n, ErrFormat)
		}
		b = append(b, uint8(len(rest)), index)
		b = le.AppendUint16(b, uint16(len(attrs[n])))
		b = append(b, rest...)
		b = append(b, attrs[n]...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	if len(b) > MaxXattrs {
		return nil, fmt.Errorf("store attributes of %d bytes: %w", len(b), ErrFormat)
	}
	return b, nil
}

// checkName refuses what a directory can't hold.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > MaxName || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("store name %.40q: %w", name, ErrFormat)
	}
	return nil
}
