// Package rootfs merges the layers of a container image, bottom-up, into one
// EROFS file system. The tree is in memory, content goes straight to the file,
// so neither root nor mounts are needed and an entry of a hostile archive has
// nothing to escape to: there is no file system below it to leave.
package rootfs

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"fcvm/internal/image/erofs"
)

// ErrLayer means that a layer is malformed or tries what no layer may.
var ErrLayer = errors.New("bad layer")

const (
	// maxLinks is how many symbolic links one path may go through; as many as
	// the kernel follows.
	maxLinks = 40
	// maxPath is PATH_MAX: nobody could use a longer path anyway.
	maxPath = 4096
	// maxDepth of directories. Symbolic links let an archive make deeper trees
	// than its longest name, and what walks the tree is recursive.
	maxDepth = maxPath / 2
)

// node is a file. A directory has children; any other may have several names.
type node struct {
	erofs.Inode
	children map[string]*dentry
	names    int
}

// dentry is a name in a directory.
type dentry struct {
	*node
	// layer that last wrote this name. Whiteouts of a layer hide only what
	// layers below it wrote, in whatever order the archive has them.
	layer int
}

func (n *node) isDir() bool  { return n.Mode&erofs.ModeType == erofs.ModeDir }
func (n *node) isLink() bool { return n.Mode&erofs.ModeType == erofs.ModeLink }
func (n *node) isFile() bool { return n.Mode&erofs.ModeType == erofs.ModeFile }

func newDir() *node {
	return &node{
		Inode:    erofs.Inode{Mode: erofs.ModeDir | 0o755, MTime: time.Unix(0, 0)},
		children: map[string]*dentry{},
	}
}

// cleanName returns the components of a name in an archive. Absolute names
// start at the root of the image, as relative ones do. One whose ".." leave the
// root is refused, as docker does.
func cleanName(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, fmt.Errorf("%w: name of %d bytes: %.40q…", ErrLayer, len(name), name)
	}
	if strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("%w: name with a zero byte: %q", ErrLayer, name)
	}
	rel := path.Clean(strings.TrimLeft(name, "/"))
	if rel == ".." || strings.HasPrefix(rel, "../") {
		return nil, fmt.Errorf("%w: %q leaves the root directory", ErrLayer, name)
	}
	if rel == "." {
		return nil, nil
	}
	parts := strings.Split(rel, "/")
	for _, p := range parts {
		if len(p) > erofs.MaxName {
			return nil, fmt.Errorf("%w: name longer than %d bytes: %.40q…", ErrLayer, erofs.MaxName, p)
		}
	}
	return parts, nil
}

// errMissing is returned by resolve when a directory does not exist.
var errMissing = errors.New("no such directory")

// resolve walks to the directory that parts name, through symbolic links, which
// all are taken relative to the image's root: neither an absolute target nor
// any number of ".." gets out of it. Where a directory is missing it is made if
// create is set, with root as its owner and mode 0755, as docker does.
func (b *Builder) resolve(parts []string, create bool) (*node, error) {
	stack := []*node{b.root}
	todo := append([]string(nil), parts...)
	links := 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		cur := stack[len(stack)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		d, ok := cur.children[name]
		if !ok {
			if !create {
				return nil, errMissing
			}
			if len(name) > erofs.MaxName {
				return nil, fmt.Errorf("%w: directory %.40q… can't be made", ErrLayer, name)
			}
			n := newDir()
			if err := b.set(cur, name, n); err != nil {
				return nil, err
			}
			stack = append(stack, n)
			continue
		}
		switch {
		case d.isDir():
			stack = append(stack, d.node)
		case d.isLink():
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%w: too many symbolic links on the way to %q", ErrLayer, strings.Join(parts, "/"))
			}
			if strings.HasPrefix(d.Target, "/") {
				stack = stack[:1]
			}
			todo = append(strings.Split(d.Target, "/"), todo...)
		default:
			return nil, fmt.Errorf("%w: %q is not a directory on the way to %q", ErrLayer, name, strings.Join(parts, "/"))
		}
	}
	if len(stack) > maxDepth {
		return nil, fmt.Errorf("%w: directories deeper than %d", ErrLayer, maxDepth)
	}
	return stack[len(stack)-1], nil
}

// set puts n into dir. What had the name before goes away.
func (b *Builder) set(dir *node, name string, n *node) error {
	old, ok := dir.children[name]
	if ok && old.node == n {
		old.layer = b.layer
		return nil
	}
	// Counted before the old one goes: n may have its other name in there.
	n.names++
	if ok {
		if err := b.drop(dir, name); err != nil {
			return err
		}
	}
	if b.entries++; b.entries > b.limits.Entries {
		return fmt.Errorf("%w: more than %d files", ErrLayer, b.limits.Entries)
	}
	dir.children[name] = &dentry{n, b.layer}
	return nil
}

// drop removes a name and all below it, and frees content that has no name left.
func (b *Builder) drop(dir *node, name string) error {
	d, ok := dir.children[name]
	if !ok {
		return nil
	}
	for c := range d.children {
		if err := b.drop(d.node, c); err != nil {
			return err
		}
	}
	delete(dir.children, name)
	b.entries--
	d.names--
	if d.names == 0 && d.isFile() {
		return b.w.Discard(d.Data)
	}
	return nil
}

// hide removes from below name what lower layers wrote. It keeps the name when
// this layer wrote it, or anything below it.
func (b *Builder) hide(dir *node, name string) error {
	d, ok := dir.children[name]
	if !ok {
		return nil
	}
	if d.isDir() {
		if err := b.hideAll(d.node); err != nil {
			return err
		}
	}
	if d.layer == b.layer || len(d.children) > 0 {
		return nil
	}
	return b.drop(dir, name)
}

func (b *Builder) hideAll(dir *node) error {
	for name := range dir.children {
		if err := b.hide(dir, name); err != nil {
			return err
		}
	}
	return nil
}

// finish fills in the entries that package erofs wants.
func (n *node) finish() *erofs.Inode {
	if n.Entries == nil && len(n.children) > 0 {
		n.Entries = make([]erofs.Entry, 0, len(n.children))
		for name, d := range n.children {
			n.Entries = append(n.Entries, erofs.Entry{Name: name, Inode: d.finish()})
		}
	}
	return &n.Inode
}
