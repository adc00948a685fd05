package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/image/erofs"
	"fcvm/internal/image/erofs/erofstest"
)

// image is a file system that is being written in a test.
type image struct {
	*erofs.Writer
	t    *testing.T
	out  *os.File
	root *erofs.Inode
}

func create(t *testing.T) *image {
	t.Helper()
	dir := t.TempDir()
	open := func(name string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	out := open("image")
	return &image{erofs.NewWriter(out, open("spool")), t, out, &erofs.Inode{Mode: erofs.ModeDir | 0o755}}
}

// put adds n under a slash-separated path, making directories.
func (i *image) put(path string, n *erofs.Inode) *erofs.Inode {
	dir := i.root
	parts := strings.Split(path, "/")
next:
	for _, p := range parts[:len(parts)-1] {
		for _, e := range dir.Entries {
			if e.Name == p {
				dir = e.Inode
				continue next
			}
		}
		sub := &erofs.Inode{Mode: erofs.ModeDir | 0o755}
		dir.Entries = append(dir.Entries, erofs.Entry{Name: p, Inode: sub})
		dir = sub
	}
	dir.Entries = append(dir.Entries, erofs.Entry{Name: parts[len(parts)-1], Inode: n})
	return n
}

func (i *image) file(path, data string, xattrs map[string]string) *erofs.Inode {
	i.t.Helper()
	d, err := i.Append(strings.NewReader(data), int64(len(data)), xattrs)
	if err != nil {
		i.t.Fatal(err)
	}
	return i.put(path, &erofs.Inode{Mode: erofs.ModeFile | 0o644, Data: d, Xattrs: xattrs})
}

func (i *image) finish() string {
	i.t.Helper()
	size, err := i.Finish(i.root)
	if err != nil {
		i.t.Fatal(err)
	}
	fi, err := i.out.Stat()
	if err != nil {
		i.t.Fatal(err)
	}
	if fi.Size() != size || size%4096 != 0 {
		i.t.Errorf("Finish says %d bytes, the file has %d", size, fi.Size())
	}
	return i.out.Name()
}

func pattern(n int, seed uint64) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(b) // never fails
	return string(b)
}

func TestSizes(t *testing.T) {
	i := create(t)
	want := map[string]string{}
	for _, n := range []int{0, 1, 100, 2047, 2048, 2049, 4031, 4032, 4095, 4096, 4097, 6144, 6145, 8191, 8192, 8193, 1<<20 + 7} {
		name := fmt.Sprint("size", n)
		want[name] = pattern(n, uint64(n))
		i.file(name, want[name], nil)
	}
	got := erofstest.Check(t, i.finish())
	for name, data := range want {
		if got[name].Data != data {
			t.Errorf("%s: content differs", name)
		}
	}
	if len(got) != len(want)+1 {
		t.Errorf("%d files, want %d", len(got), len(want)+1)
	}
}

func TestTypes(t *testing.T) {
	i := create(t)
	i.root.Mode = erofs.ModeDir | 0o1751
	i.root.UID, i.root.GID = 3, 4
	when := time.Date(2031, 2, 3, 4, 5, 6, 789, time.UTC)
	old := time.Date(1950, 1, 1, 0, 0, 0, 5, time.UTC)
	set := func(n *erofs.Inode, mode uint16, uid, gid uint32, at time.Time) *erofs.Inode {
		n.Mode = n.Mode&erofs.ModeType | mode
		n.UID, n.GID, n.MTime = uid, gid, at
		return n
	}
	set(i.file("suid", "x", nil), 0o4755, 1, 2, when)
	set(i.file("sgid", "", nil), 0o2711, 70000, 1<<32-2, old)
	set(i.put("d/tmp", &erofs.Inode{Mode: erofs.ModeDir}), 0o1777, 0, 0, when)
	set(i.put("fifo", &erofs.Inode{Mode: erofs.ModeFifo}), 0o600, 5, 6, when)
	set(i.put("sock", &erofs.Inode{Mode: erofs.ModeSocket}), 0o666, 5, 6, when)
	set(i.put("null", &erofs.Inode{Mode: erofs.ModeChar, Major: 1, Minor: 3}), 0o666, 0, 0, when)
	set(i.put("disk", &erofs.Inode{Mode: erofs.ModeBlock, Major: 4095, Minor: 1<<20 - 1}), 0o660, 0, 6, when)
	set(i.put("link", &erofs.Inode{Mode: erofs.ModeLink, Target: "../../etc/passwd"}), 0o777, 7, 8, when)

	got := erofstest.Check(t, i.finish())
	for name, want := range map[string]erofstest.File{
		".":     {Mode: fs.ModeDir | fs.ModeSticky | 0o751, UID: 3, GID: 4, MTime: time.Time{}, Links: 3},
		"suid":  {Mode: fs.ModeSetuid | 0o755, UID: 1, GID: 2, MTime: when, Links: 1, Data: "x"},
		"sgid":  {Mode: fs.ModeSetgid | 0o711, UID: 70000, GID: 1<<32 - 2, MTime: old, Links: 1},
		"d":     {Mode: fs.ModeDir | 0o755, MTime: time.Time{}, Links: 3},
		"d/tmp": {Mode: fs.ModeDir | fs.ModeSticky | 0o777, MTime: when, Links: 2},
		"fifo":  {Mode: fs.ModeNamedPipe | 0o600, UID: 5, GID: 6, MTime: when, Links: 1},
		"sock":  {Mode: fs.ModeSocket | 0o666, UID: 5, GID: 6, MTime: when, Links: 1},
		"null":  {Mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, MTime: when, Links: 1, Rdev: unix.Mkdev(1, 3)},
		"disk":  {Mode: fs.ModeDevice | 0o660, GID: 6, MTime: when, Links: 1, Rdev: unix.Mkdev(4095, 1<<20-1)},
		"link":  {Mode: fs.ModeSymlink | 0o777, UID: 7, GID: 8, MTime: when, Links: 1, Target: "../../etc/passwd"},
	} {
		want.Same = name
		if g, w := fmt.Sprintf("%+v", got[name]), fmt.Sprintf("%+v", want); g != w {
			t.Errorf("%s:\n got %s\nwant %s", name, g, w)
		}
	}
}

func TestHardLinks(t *testing.T) {
	i := create(t)
	n := i.file("a", "shared", nil)
	i.put("d/b", n)
	i.put("z", n)
	dev := i.put("dev", &erofs.Inode{Mode: erofs.ModeChar, Major: 5})
	i.put("dev2", dev)
	got := erofstest.Check(t, i.finish())
	for _, name := range []string{"a", "d/b", "z"} {
		if f := got[name]; f.Data != "shared" || f.Links != 3 || f.Same != "a" {
			t.Errorf("%s: %+v", name, f)
		}
	}
	if f := got["dev2"]; f.Links != 2 || f.Same != "dev" {
		t.Errorf("dev2: %+v", f)
	}
}

// Directories of many blocks, whose names sort around "." and "..".
func TestLargeDirectory(t *testing.T) {
	i := create(t)
	var want []string
	for _, n := range []string{"!", "-", "...", ".a", "..a", "A", "\xff", "\x01", "ä", " "} {
		want = append(want, "d/"+n)
	}
	for n := range 3000 {
		want = append(want, fmt.Sprintf("d/%0*d", 1+n%200, n))
	}
	for _, name := range want {
		if !fs.ValidPath(strings.ToValidUTF8(name, "?")) {
			t.Fatal(name)
		}
		i.put(name, &erofs.Inode{Mode: erofs.ModeFifo})
	}
	path := i.finish()
	got, ok := erofstest.ReadMounted(t, path)
	if !ok {
		var err error
		if got, err = erofstest.Read(path); err != nil {
			t.Fatal(err)
		}
		// Names that are not UTF-8 are not for Go's fs.FS.
		got["d/\xff"] = erofstest.File{}
	}
	erofstest.Fsck(t, path)
	for _, name := range want {
		if _, ok := got[name]; !ok {
			t.Errorf("%q is missing", name)
		}
	}
	if len(got) != len(want)+2 {
		t.Errorf("%d files, want %d", len(got), len(want)+2)
	}
}

func TestLinkTargets(t *testing.T) {
	i := create(t)
	want := map[string]string{}
	for _, n := range []int{1, 59, 60, 3000, 4031, 4032, 4033, erofs.MaxTarget} {
		name := fmt.Sprint("l", n)
		want[name] = strings.Repeat("t", n)
		i.put(name, &erofs.Inode{Mode: erofs.ModeLink | 0o777, Target: want[name]})
	}
	got := erofstest.Check(t, i.finish())
	for name, target := range want {
		if got[name].Target != target {
			t.Errorf("%s: target of %d bytes", name, len(got[name].Target))
		}
	}
}

func TestXattrs(t *testing.T) {
	all := map[string]map[string]string{
		"caps":  {"security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		"user":  {"user.a": "1", "user.bc": "", "user." + strings.Repeat("n", 200): "long name"},
		"three": {"user.x": "u", "trusted.x": "t", "security.x": "s"},
		"block": {"user.big": pattern(3900, 1)},
		"huge":  {"user.big": pattern(20000, 2), "user.c": "c"},
	}
	i := create(t)
	for name, x := range all {
		i.file(name, "data of "+name, x)
		i.put("dirs/"+name, &erofs.Inode{Mode: erofs.ModeDir | 0o755, Xattrs: x})
	}
	got := erofstest.Check(t, i.finish())
	for name, want := range all {
		for _, path := range []string{name, "dirs/" + name} {
			if fmt.Sprint(got[path].Xattrs) != fmt.Sprint(want) {
				t.Errorf("%s: attributes %.200q, want %.200q", path, got[path].Xattrs, want)
			}
		}
		if got[name].Data != "data of "+name {
			t.Errorf("%s: content %q", name, got[name].Data)
		}
	}
}

func TestKnownXattr(t *testing.T) {
	for name, want := range map[string]bool{
		"user.a": true, "trusted.a": true, "security.capability": true, "system.posix_acl_access": true,
		"system.posix_acl_default": true, "user.": false, "system.other": false, "system.posix_acl_accessx": false, "x": false, "": false,
	} {
		if got := erofs.KnownXattr(name); got != want {
			t.Errorf("KnownXattr(%q) = %v", name, got)
		}
	}
}

// What is discarded takes no disk space and changes nothing else.
func TestDiscard(t *testing.T) {
	i := create(t)
	i.file("before", pattern(5000, 1), nil)
	gone, err := i.Append(strings.NewReader(pattern(8<<20, 2)), 8<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	i.file("after", pattern(5000, 3), nil)
	if err := i.Discard(gone); err != nil {
		t.Fatal(err)
	}
	path := i.finish()
	got := erofstest.Check(t, path)
	if got["before"].Data != pattern(5000, 1) || got["after"].Data != pattern(5000, 3) {
		t.Error("Discard changed other content")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, make([]byte, 8<<20)) {
		t.Error("discarded content is still in the file")
	}
	if err := i.out.Sync(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(i.out.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the file takes %d bytes of disk", st.Blocks*512)
	}
}

func TestDeterministic(t *testing.T) {
	var images [2][]byte
	for k := range images {
		i := create(t)
		for n := range 50 {
			i.file(fmt.Sprint("d/", n), pattern(n*100, uint64(n)), map[string]string{"user.a": "1", "user.b": "2", "user.c": "3"})
		}
		b, err := os.ReadFile(i.finish())
		if err != nil {
			t.Fatal(err)
		}
		images[k] = b
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("equal trees, different bytes")
	}
}

func TestAppendFailures(t *testing.T) {
	i := create(t)
	if _, err := i.Append(strings.NewReader("short"), 10, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short input: %v", err)
	}
	if _, err := i.Append(strings.NewReader("short"), 10000, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short input: %v", err)
	}
	// The writer is still usable: nothing lies where it should not.
	i.file("f", pattern(9000, 1), nil)
	if got := erofstest.Check(t, i.finish()); got["f"].Data != pattern(9000, 1) {
		t.Error("content after a failed Append differs")
	}
	if _, err := i.Append(strings.NewReader(""), 0, nil); err == nil {
		t.Error("Append after Finish succeeds")
	}
}

func TestRefused(t *testing.T) {
	deep := func(i *image) { i.put(strings.Repeat("d/", 5000)+"x", &erofs.Inode{Mode: erofs.ModeFifo}) }
	for name, build := range map[string]func(*image){
		"root is a file": func(i *image) { i.root.Mode = erofs.ModeFile },
		"no type":        func(i *image) { i.put("x", &erofs.Inode{Mode: 0o644}) },
		"empty name":     func(i *image) { i.put("d/", &erofs.Inode{Mode: erofs.ModeFifo}) },
		"dot dot":        func(i *image) { i.put("..", &erofs.Inode{Mode: erofs.ModeFifo}) },
		"zero byte":      func(i *image) { i.put("a\x00", &erofs.Inode{Mode: erofs.ModeFifo}) },
		"long name":      func(i *image) { i.put(strings.Repeat("n", 256), &erofs.Inode{Mode: erofs.ModeFifo}) },
		"no target":      func(i *image) { i.put("l", &erofs.Inode{Mode: erofs.ModeLink}) },
		"long target":    func(i *image) { i.put("l", &erofs.Inode{Mode: erofs.ModeLink, Target: strings.Repeat("t", 4096)}) },
		"device number":  func(i *image) { i.put("d", &erofs.Inode{Mode: erofs.ModeChar, Minor: 1 << 20}) },
		"depth":          deep,
		"unknown xattr":  func(i *image) { i.put("f", &erofs.Inode{Mode: erofs.ModeFifo, Xattrs: map[string]string{"x.y": ""}}) },
		"large xattr": func(i *image) {
			i.put("f", &erofs.Inode{Mode: erofs.ModeFifo, Xattrs: map[string]string{"user.y": pattern(70000, 1)}})
		},
		"xattr not told": func(i *image) {
			i.file("f", pattern(2000, 1), nil).Xattrs = map[string]string{"user.y": pattern(3000, 1)}
		},
		"directory linked": func(i *image) { i.put("b", i.put("a", &erofs.Inode{Mode: erofs.ModeDir})) },
		"name twice": func(i *image) {
			i.put("a", &erofs.Inode{Mode: erofs.ModeFifo})
			i.put("a", &erofs.Inode{Mode: erofs.ModeFifo})
		},
	} {
		t.Run(name, func(t *testing.T) {
			i := create(t)
			build(i)
			if _, err := i.Finish(i.root); !errors.Is(err, erofs.ErrFormat) {
				t.Errorf("Finish: %v", err)
			}
		})
	}
}
