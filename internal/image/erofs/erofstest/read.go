// Package erofstest reads EROFS file systems in tests, in two independent ways:
// with the reader of go-erofs, as any user, and with the kernel, as root.
package erofstest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// File is all that a file system says of a file.
type File struct {
	Mode   fs.FileMode
	UID    uint32
	GID    uint32
	MTime  time.Time // UTC
	Links  int
	Rdev   uint64 // as unix.Mkdev
	Target string
	Xattrs map[string]string
	Data   string
	// Same is the first name (in the order of the walk) of the same inode.
	Same string
}

// Read reads the file system in the file at path with go-erofs. Names are
// relative; the root is ".".
func Read(path string) (map[string]File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	img, err := goerofs.Open(f)
	if err != nil {
		return nil, err
	}
	out := map[string]File{}
	first := map[int64]string{}
	err = fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := fi.Sys().(*goerofs.Stat)
		if !ok {
			return fmt.Errorf("%s: no *Stat", name)
		}
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = name
		}
		x := File{
			// The Mode of its FileInfo has no setuid, setgid and sticky bits.
			Mode: st.Mode, UID: st.UID, GID: st.GID, Links: st.Nlink,
			MTime: time.Unix(int64(st.Mtime), int64(st.MtimeNs)).UTC(), Same: first[st.Ino],
		}
		if fi.Mode()&fs.ModeDevice != 0 {
			// As new_decode_dev in the kernel.
			x.Rdev = unix.Mkdev(st.Rdev&0xfff00>>8, st.Rdev&0xff|st.Rdev>>12&0xfff00)
		}
		if len(st.Xattrs) > 0 {
			x.Xattrs = st.Xattrs
		}
		switch {
		case fi.Mode().IsRegular():
			b, err := fs.ReadFile(img, name)
			if err != nil {
				return err
			}
			x.Data = string(b)
		case fi.Mode()&fs.ModeSymlink != 0:
			if x.Target, err = fs.ReadLink(img, name); err != nil {
				return err
			}
		}
		out[name] = x
		return nil
	})
	return out, err
}

// Fsck runs fsck.erofs, where it is installed.
func Fsck(t testing.TB, path string) {
	t.Helper()
	if _, err := exec.LookPath("fsck.erofs"); err != nil {
		t.Log("not checked with fsck.erofs: it is not installed (erofs-utils)")
		return
	}
	if out, err := exec.Command("fsck.erofs", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// ReadMounted reads the file system with the kernel. It returns false, after
// logging why, where this process can't mount it.
func ReadMounted(t testing.TB, path string) (map[string]File, bool) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Log("not read with the kernel: mounting needs root")
		return nil, false
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil || !bytes.Contains(known, []byte("\terofs\n")) {
		t.Log("not read with the kernel: it has no erofs")
		return nil, false
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", path, dir).CombinedOutput(); err != nil {
		if strings.Contains(string(out), "loop") {
			t.Logf("not read with the kernel: no loop device: %s", out)
			return nil, false
		}
		t.Fatalf("mount: %v\n%s", err, out)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	}()
	files, err := walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return files, true
}

func walk(dir string) (map[string]File, error) {
	out := map[string]File{}
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = name
		}
		x := File{
			Mode: fi.Mode(), UID: st.Uid, GID: st.Gid, MTime: fi.ModTime().UTC(),
			Links: int(st.Nlink), Rdev: st.Rdev, Same: first[st.Ino],
		}
		if x.Xattrs, err = xattrs(path); err != nil {
			return err
		}
		switch {
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			x.Data = string(b)
		case fi.Mode()&fs.ModeSymlink != 0:
			if x.Target, err = os.Readlink(path); err != nil {
				return err
			}
		}
		out[name] = x
		return nil
	})
	return out, err
}

func xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attributes of %s: %w", path, err)
	}
	out := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			return nil, fmt.Errorf("read attribute %s of %s: %w", name, path, err)
		}
		out[name] = string(v[:n])
	}
	return out, nil
}

// Check reads the file system with go-erofs, checks it with fsck.erofs, reads it
// with the kernel where that is possible, fails the test unless all agree, and
// returns what they read.
func Check(t testing.TB, path string) map[string]File {
	t.Helper()
	files, err := Read(path)
	if err != nil {
		t.Fatalf("read with go-erofs: %v", err)
	}
	Fsck(t, path)
	mounted, ok := ReadMounted(t, path)
	if !ok {
		return files
	}
	for name, f := range files {
		m, ok := mounted[name]
		if !ok {
			t.Errorf("%s: the kernel does not see it", name)
			continue
		}
		if a, b := fmt.Sprintf("%+v", f), fmt.Sprintf("%+v", m); a != b {
			t.Errorf("%s: go-erofs reads\n%.500s\nthe kernel reads\n%.500s", name, a, b)
		}
		delete(mounted, name)
	}
	for name := range mounted {
		t.Errorf("%s: only the kernel sees it", name)
	}
	return files
}
