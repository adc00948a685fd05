package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"strings"

	"fcvm/internal/image/erofs"
)

// Limits hold a hostile image back from filling memory and disk. Zero fields
// mean the defaults.
type Limits struct {
	// Entries is the number of names in the merged tree.
	Entries int
	// Bytes is the content of all layers together, whether it survives or not.
	Bytes int64
}

// The default limits. They are far above real images.
const (
	DefaultEntries = 4 << 20
	DefaultBytes   = 64 << 30
)

// Whiteouts, as in the OCI image specification (layer.md).
const (
	whiteout = ".wh."
	aufsMeta = ".wh..wh."
	opaque   = ".wh..wh..opq"
)

// xattrRecord is how tar has extended attributes (PAX, as star and GNU tar).
const xattrRecord = "SCHILY.xattr."

// Builder makes a file system of layers. It is not safe for concurrent use.
type Builder struct {
	w       *erofs.Writer
	root    *node
	layer   int
	entries int
	bytes   int64
	limits  Limits
}

// New starts a file system in out; see erofs.NewWriter about the files.
func New(out, spool *os.File, l Limits) *Builder {
	if l.Entries == 0 {
		l.Entries = DefaultEntries
	}
	if l.Bytes == 0 {
		l.Bytes = DefaultBytes
	}
	return &Builder{w: erofs.NewWriter(out, spool), root: newDir(), limits: l}
}

// Apply merges the next layer, an uncompressed tar archive, over those before.
// Errors about the archive wrap ErrLayer; others are r's or the disk's. After
// an error the builder is of no use.
func (b *Builder) Apply(ctx context.Context, r io.Reader) error {
	b.layer++
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		// Names that leave the root are ours to judge, whatever GODEBUG says.
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return readError(err)
		}
		if err := b.entry(h, tr); err != nil {
			return err
		}
	}
}

// readError marks what the archive is to blame for.
func readError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: read archive: %w", ErrLayer, err)
	}
	return err
}

// Finish writes the file system and returns its size in bytes. The caller syncs.
func (b *Builder) Finish() (int64, error) {
	return b.w.Finish(b.root.finish())
}

func (b *Builder) entry(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	for _, p := range parts {
		// Other than whiteouts, aufs kept files of its own under such names.
		if strings.HasPrefix(p, aufsMeta) && p != opaque {
			return nil
		}
	}
	if len(parts) == 0 {
		return b.rootEntry(h)
	}
	dir, name := parts[:len(parts)-1], parts[len(parts)-1]
	if hidden, ok := strings.CutPrefix(name, whiteout); ok {
		return b.whiteout(dir, name, hidden)
	}
	parent, err := b.resolve(dir, true)
	if err != nil {
		return err
	}
	n, err := b.node(h, parent, name, r)
	if err != nil {
		return fmt.Errorf("%q: %w", h.Name, err)
	}
	if old, ok := parent.children[name]; ok && old.isDir() && n.isDir() {
		// A directory over a directory only changes what it says of itself.
		n.children = old.children
		n.names = old.names
		old.node, old.layer = n, b.layer
		return nil
	}
	return b.set(parent, name, n)
}

// rootEntry changes owner, mode and attributes of the root directory.
func (b *Builder) rootEntry(h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return fmt.Errorf("%w: %q would replace the root directory", ErrLayer, h.Name)
	}
	n, err := inode(h)
	if err != nil {
		return err
	}
	n.children = b.root.children
	b.root = n
	return nil
}

func (b *Builder) whiteout(dir []string, name, hidden string) error {
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("%w: whiteout %q hides nothing", ErrLayer, name)
	}
	parent, err := b.resolve(dir, false)
	if errors.Is(err, errMissing) {
		return nil
	}
	if err != nil {
		return err
	}
	if name == opaque {
		return b.hideAll(parent)
	}
	return b.hide(parent, hidden)
}

// node makes the file that the header describes, with its content.
func (b *Builder) node(h *tar.Header, parent *node, name string, r io.Reader) (*node, error) {
	if h.Typeflag == tar.TypeLink {
		return b.hardLink(h)
	}
	n, err := inode(h)
	if err != nil || !n.isFile() {
		return n, err
	}
	if h.Size < 0 || b.bytes > b.limits.Bytes-h.Size {
		return nil, fmt.Errorf("%w: more than %d bytes of content", ErrLayer, b.limits.Bytes)
	}
	b.bytes += h.Size
	n.Data, err = b.w.Append(r, h.Size, n.Xattrs)
	if err != nil {
		return nil, readError(err)
	}
	return n, nil
}

// hardLink finds the file that a hard link names. Symbolic links on the way
// are followed inside the image, the last component is not.
func (b *Builder) hardLink(h *tar.Header) (*node, error) {
	parts, err := cleanName(h.Linkname)
	if err != nil {
		return nil, err
	}
	if len(parts) > 0 {
		dir, err := b.resolve(parts[:len(parts)-1], false)
		if err != nil && !errors.Is(err, errMissing) {
			return nil, err
		}
		if err == nil {
			if d, ok := dir.children[parts[len(parts)-1]]; ok && !d.isDir() {
				return d.node, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: hard link to %q, which is not a file of this image", ErrLayer, h.Linkname)
}

// inode makes a file without content from a header that is no hard link.
func inode(h *tar.Header) (*node, error) {
	n := &node{}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeCont, tar.TypeGNUSparse: //nolint:staticcheck // TypeRegA is in old archives
		n.Mode = erofs.ModeFile
	case tar.TypeDir:
		n = newDir()
		n.Mode = erofs.ModeDir
	case tar.TypeSymlink:
		n.Mode = erofs.ModeLink
		n.Target = h.Linkname
		if n.Target == "" || len(n.Target) > erofs.MaxTarget || strings.ContainsRune(n.Target, 0) {
			return nil, fmt.Errorf("%w: symbolic link to %.40q", ErrLayer, n.Target)
		}
	case tar.TypeChar:
		n.Mode = erofs.ModeChar
	case tar.TypeBlock:
		n.Mode = erofs.ModeBlock
	case tar.TypeFifo:
		n.Mode = erofs.ModeFifo
	default:
		return nil, fmt.Errorf("%w: entry of unknown type %q", ErrLayer, h.Typeflag)
	}
	n.Mode |= uint16(h.Mode & 0o7777)
	// The highest number is no owner but -1, "unchanged".
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return nil, fmt.Errorf("%w: owner %d:%d", ErrLayer, h.Uid, h.Gid)
	}
	n.UID, n.GID, n.MTime = uint32(h.Uid), uint32(h.Gid), h.ModTime
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, fmt.Errorf("%w: device %d:%d", ErrLayer, h.Devmajor, h.Devminor)
		}
		n.Major, n.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	return n, n.setXattrs(h)
}

// setXattrs takes the attributes that the file system can have. Those of an
// overlay are left out: they would not describe this file but tell the guest's
// own overlay what to do with it.
func (n *node) setXattrs(h *tar.Header) error {
	size := 0
	for k, v := range h.PAXRecords {
		k, ok := strings.CutPrefix(k, xattrRecord)
		if !ok || !erofs.KnownXattr(k) ||
			strings.HasPrefix(k, "trusted.overlay.") || strings.HasPrefix(k, "user.overlay.") {
			continue
		}
		if size += len(k) + len(v) + 8; size > erofs.MaxXattrs/2 || len(k) > erofs.MaxName {
			return fmt.Errorf("%w: extended attributes of %s are too large", ErrLayer, path.Base(h.Name))
		}
		if n.Xattrs == nil {
			n.Xattrs = map[string]string{}
		}
		n.Xattrs[k] = v
	}
	return nil
}
