package guestd

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/proto"
)

// copyIn unpacks the client's tar stream, whose entries all begin with one name,
// as docker cp does: if dest is a directory, below it; else dest is the new name, in
// a directory that must exist. The entries of "." go right into dest.
func copyIn(conn net.Conn, dest string) error {
	if !filepath.IsAbs(dest) {
		return fmt.Errorf("copy to %q: the path is not absolute", dest)
	}
	in := &frameReader{r: conn, buf: make([]byte, proto.MaxPayload)}
	t := tar.NewReader(in)
	h, err := t.Next()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("copy to %s: nothing was sent", dest)
	}
	if err != nil {
		return fmt.Errorf("copy to %s: read tar: %w", dest, err)
	}
	u, err := newUnpacker(dest, h)
	if err != nil {
		return fmt.Errorf("copy to %s: %w", dest, err)
	}
	defer u.root.Close()
	for ; err == nil; h, err = t.Next() {
		if err := u.entry(h, t); err != nil {
			return fmt.Errorf("copy to %s: %w", dest, err)
		}
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("copy to %s: read tar: %w", dest, err)
	}
	if err := u.finish(); err != nil {
		return fmt.Errorf("copy to %s: %w", dest, err)
	}
	_, err = io.Copy(io.Discard, in) // padding
	return err
}

// unpacker writes tar entries below root. os.Root keeps links inside the archive
// from leading out of it.
type unpacker struct {
	root *os.Root
	// from is the first part of every entry's name; to is put in its place.
	from, to string
	times    []dirTime // set last: writing into a directory changes them
}

type dirTime struct {
	name string
	when time.Time
}

func newUnpacker(dest string, first *tar.Header) (*unpacker, error) {
	name, _, _ := strings.Cut(path.Clean(strings.TrimPrefix(first.Name, "/")), "/")
	if name == ".." {
		return nil, fmt.Errorf("the archive has an entry named %q", first.Name)
	}
	fi, err := os.Stat(dest)
	switch {
	case err == nil && fi.IsDir():
		root, err := os.OpenRoot(dest)
		return &unpacker{root: root, from: name, to: name}, err
	case err == nil && first.Typeflag == tar.TypeDir:
		return nil, errors.New("a directory cannot replace a file")
	case err == nil && strings.HasSuffix(dest, "/"):
		return nil, syscall.ENOTDIR
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	case err != nil && strings.HasSuffix(dest, "/") && first.Typeflag != tar.TypeDir:
		return nil, errors.New("there is no such directory")
	}
	dest = filepath.Clean(dest)
	root, err := os.OpenRoot(filepath.Dir(dest))
	return &unpacker{root: root, from: name, to: filepath.Base(dest)}, err
}

// rename maps an entry's name to the one it gets.
func (u *unpacker) rename(name string) (string, error) {
	clean := path.Clean(strings.TrimPrefix(name, "/"))
	if u.from == "." {
		if clean == ".." || strings.HasPrefix(clean, "../") {
			return "", fmt.Errorf("the archive has an entry named %q", name)
		}
		return path.Join(u.to, clean), nil
	}
	first, rest, _ := strings.Cut(clean, "/")
	if first != u.from {
		return "", fmt.Errorf("the archive has an entry %q outside of %q", name, u.from)
	}
	return path.Join(u.to, rest), nil
}

func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	name, err := u.rename(h.Name)
	if err != nil {
		return err
	}
	mode := h.FileInfo().Mode()
	if h.Typeflag != tar.TypeDir {
		if fi, err := u.root.Lstat(name); err == nil {
			if fi.IsDir() {
				return fmt.Errorf("%s is a directory, and a file cannot replace it", name)
			}
			if err := u.root.Remove(name); err != nil {
				return err
			}
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if err := u.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		u.times = append(u.times, dirTime{name, h.ModTime})
	case tar.TypeReg:
		if err := u.file(name, r); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := u.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		_ = u.root.Lchown(name, h.Uid, h.Gid) // fails where we are not root
		return nil
	case tar.TypeLink:
		old, err := u.rename(h.Linkname)
		if err != nil {
			return err
		}
		return u.root.Link(old, name)
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		if err := u.node(name, h); err != nil {
			return err
		}
	default:
		return nil // a header of the archive's own
	}
	_ = u.root.Lchown(name, h.Uid, h.Gid) // fails where we are not root
	if err := u.root.Chmod(name, mode&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return u.root.Chtimes(name, h.ModTime, h.ModTime)
}

func (u *unpacker) file(name string, r io.Reader) error {
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

func (u *unpacker) node(name string, h *tar.Header) error {
	dir, err := u.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	kind := map[byte]uint32{tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK}[h.Typeflag]
	dev := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	if err := unix.Mknodat(int(dir.Fd()), path.Base(name), kind|0o600, int(dev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: name, Err: err}
	}
	return nil
}

func (u *unpacker) finish() error {
	for i := len(u.times) - 1; i >= 0; i-- {
		if err := u.root.Chtimes(u.times[i].name, u.times[i].when, u.times[i].when); err != nil {
			return err
		}
	}
	return nil
}

// frameReader is the data of FrameStdin frames.
type frameReader struct {
	r    io.Reader
	buf  []byte
	rest []byte
	eof  bool
}

func (f *frameReader) Read(p []byte) (int, error) {
	for len(f.rest) == 0 {
		if f.eof {
			return 0, io.EOF
		}
		fr, err := proto.ReadFrame(f.r, f.buf)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return 0, err
		}
		switch fr.Type {
		case proto.FrameStdin:
			f.rest = fr.Payload
		case proto.FrameStdinEOF:
			f.eof = true
		default:
			return 0, proto.ErrMalformed
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

// copyOut sends src, whose tar entries begin with its last part; src ending in
// "/." is sent as ".".
func copyOut(conn net.Conn, src string) error {
	if !filepath.IsAbs(src) {
		return fmt.Errorf("copy from %q: the path is not absolute", src)
	}
	content := strings.HasSuffix(src, "/.")
	follow := content || strings.HasSuffix(src, "/")
	src = filepath.Clean(src)
	stat := os.Lstat
	if follow {
		stat = os.Stat
	}
	fi, err := stat(src)
	if err != nil {
		return fmt.Errorf("copy from the guest: %w", err)
	}
	if follow && !fi.IsDir() {
		return fmt.Errorf("copy from %s: %w", src, syscall.ENOTDIR)
	}
	name := filepath.Base(src)
	if content || src == "/" {
		name = "."
	}
	info := proto.FileInfo{Name: name, Size: fi.Size(), Mode: uint32(fi.Mode()), Dir: fi.IsDir()}
	if err := proto.WriteMessage(conn, info); err != nil {
		return err
	}
	out := proto.NewFrameWriter(conn)
	t := tar.NewWriter(&frameSink{out: out})
	if follow {
		src += "/." // a link at the end is to be followed
	}
	if err := packTree(t, src, name); err != nil {
		return fmt.Errorf("copy from %s: %w", src, err)
	}
	if err := t.Close(); err != nil {
		return fmt.Errorf("copy from %s: %w", src, err)
	}
	return out.Exit(0)
}

type frameSink struct{ out *proto.FrameWriter }

func (s *frameSink) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+proto.MaxPayload)]
		if err := s.out.Write(proto.FrameStdout, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// packTree writes src and what is below it, under name. What vanishes meanwhile
// is left out; sockets cannot be copied and are left out too.
func packTree(t *tar.Writer, src, name string) error {
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err == nil {
			var rel string
			if rel, err = filepath.Rel(src, p); err == nil {
				err = packEntry(t, p, path.Join(name, rel), d)
			}
		}
		if errors.Is(err, fs.ErrNotExist) && p != src {
			return nil
		}
		return err
	})
}

func packEntry(t *tar.Writer, file, name string, d fs.DirEntry) error {
	fi, err := d.Info()
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil
	}
	link := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(file); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name, h.Uname, h.Gname = name, "", ""
	if fi.IsDir() {
		h.Name += "/"
	}
	if !fi.Mode().IsRegular() {
		return t.WriteHeader(h)
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	// A file that grows is cut off; one that shrinks is filled up with zeros, as
	// its size is sent already.
	n, err := io.Copy(t, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		_, err = io.CopyN(t, zeros{}, h.Size-n)
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
