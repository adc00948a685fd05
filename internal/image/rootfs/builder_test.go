package rootfs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fcvm/internal/image/erofs"
	"fcvm/internal/image/erofs/erofstest"
	"fcvm/internal/image/rootfs"
)

// The entries of test layers.
func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }
func link(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}
}
func hard(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
}
func gone(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }

// file keeps its content in a place that headers of files don't use.
func file(name, data string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), Uname: data}
}

// archive writes a layer.
func archive(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		data := ""
		if h.Typeflag == tar.TypeReg {
			data, h.Uname = h.Uname, ""
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func open(t testing.TB, dir, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// build merges layers, the lowest first, and returns the path of the image.
func build(t testing.TB, limits rootfs.Limits, layers ...[]byte) (string, error) {
	t.Helper()
	tmp := t.TempDir()
	out := open(t, tmp, "image")
	b := rootfs.New(out, open(t, tmp, "spool"), limits)
	for _, l := range layers {
		if err := b.Apply(context.Background(), bytes.NewReader(l)); err != nil {
			return "", err
		}
	}
	if _, err := b.Finish(); err != nil {
		return "", err
	}
	return out.Name(), nil
}

// show writes a tree as sorted lines: "d/", "f=content", "l->target", "h==first".
func show(files map[string]erofstest.File) []string {
	var out []string
	for name, f := range files {
		switch {
		case name == ".":
		case f.Same != name:
			out = append(out, name+"=="+f.Same)
		case f.Mode.IsDir():
			out = append(out, name+"/")
		case f.Mode&fs.ModeSymlink != 0:
			out = append(out, name+"->"+f.Target)
		default:
			out = append(out, name+"="+f.Data)
		}
	}
	slices.Sort(out)
	return out
}

type entries []tar.Header

func TestMerge(t *testing.T) {
	for name, c := range map[string]struct {
		layers []entries
		want   []string
	}{
		"nothing":    {nil, nil},
		"one file":   {[]entries{{file("a", "1")}}, []string{"a=1"}},
		"upper wins": {[]entries{{file("a", "1")}, {file("a", "2")}}, []string{"a=2"}},
		"last wins":  {[]entries{{file("a", "1"), file("a", "2")}}, []string{"a=2"}},
		"names in many forms": {
			[]entries{{dir("./d/"), file("./d/a", "1"), file("/d/b", "2"), file("d//c", "3"), file("d/x/../d", "4")}},
			[]string{"d/", "d/a=1", "d/b=2", "d/c=3", "d/d=4"},
		},
		"parents are made": {[]entries{{file("a/b/c", "1")}}, []string{"a/", "a/b/", "a/b/c=1"}},
		"whiteout": {
			[]entries{{file("d/a", "1"), file("d/b", "2")}, {gone("d/.wh.a")}},
			[]string{"d/", "d/b=2"},
		},
		"whiteout of a directory": {
			[]entries{{file("d/e/a", "1"), file("d/b", "2")}, {gone("d/.wh.e")}},
			[]string{"d/", "d/b=2"},
		},
		"whiteout of nothing": {[]entries{{gone(".wh.a"), gone("x/y/.wh.a")}, {gone(".wh.b")}}, nil},
		"whiteout and again": {
			[]entries{{file("a", "1")}, {gone(".wh.a")}, {file("a", "3")}},
			[]string{"a=3"},
		},
		"whiteout spares its own layer, before": {
			[]entries{{file("a", "1")}, {file("a", "2"), gone(".wh.a")}},
			[]string{"a=2"},
		},
		"whiteout spares its own layer, after": {
			[]entries{{file("a", "1")}, {gone(".wh.a"), file("a", "2")}},
			[]string{"a=2"},
		},
		"whiteout spares what its own layer has below": {
			[]entries{{file("d/old", "1")}, {file("d/new", "2"), gone(".wh.d")}},
			[]string{"d/", "d/new=2"},
		},
		"opaque": {
			[]entries{{file("d/a", "1"), file("d/e/b", "2"), file("x", "3")}, {gone("d/.wh..wh..opq"), file("d/c", "4")}},
			[]string{"d/", "d/c=4", "x=3"},
		},
		"opaque comes last": {
			[]entries{{file("d/a", "1"), file("d/e/b", "2")}, {dir("d"), dir("d/e"), file("d/e/c", "4"), gone("d/.wh..wh..opq")}},
			[]string{"d/", "d/e/", "d/e/c=4"},
		},
		"opaque root":      {[]entries{{file("a", "1")}, {gone(".wh..wh..opq"), file("b", "2")}}, []string{"b=2"}},
		"opaque, not here": {[]entries{{file("a", "1")}, {gone("d/.wh..wh..opq")}}, []string{"a=1"}},
		"metadata of aufs": {[]entries{{file(".wh..wh.aufs", "x"), file(".wh..wh.plnk/1.2", "x"), file("a", "1")}}, []string{"a=1"}},
		"file over directory": {
			[]entries{{file("d/a", "1")}, {file("d", "2")}},
			[]string{"d=2"},
		},
		"directory over file":        {[]entries{{file("d", "1")}, {dir("d"), file("d/a", "2")}}, []string{"d/", "d/a=2"}},
		"directory over directory":   {[]entries{{file("d/a", "1")}, {dir("d"), file("d/b", "2")}}, []string{"d/", "d/a=1", "d/b=2"}},
		"directory over a link":      {[]entries{{dir("t"), link("d", "t")}, {dir("d"), file("d/a", "1")}}, []string{"d/", "d/a=1", "t/"}},
		"link over directory":        {[]entries{{file("d/a", "1")}, {link("d", "t")}}, []string{"d->t"}},
		"hard link":                  {[]entries{{file("a", "1"), hard("b", "a")}}, []string{"a=1", "b==a"}},
		"hard link to a lower layer": {[]entries{{file("a", "1")}, {hard("b", "/a")}}, []string{"a=1", "b==a"}},
		"hard link outlives its target": {
			[]entries{{file("z", strings.Repeat("1", 9000))}, {hard("b", "z"), gone(".wh.z")}},
			[]string{"b=" + strings.Repeat("1", 9000)},
		},
		"hard link and new target": {
			[]entries{{file("a", "1"), hard("b", "a")}, {file("a", "2")}},
			[]string{"a=2", "b=1"},
		},
		"hard link to itself":     {[]entries{{file("a", "1"), hard("a", "a")}}, []string{"a=1"}},
		"hard link to a symlink":  {[]entries{{link("a", "/nowhere"), hard("b", "a")}}, []string{"a->/nowhere", "b==a"}},
		"hard link through links": {[]entries{{file("usr/lib/a", "1"), link("lib", "usr/lib"), hard("b", "lib/a")}}, []string{"b=1", "lib->usr/lib", "usr/", "usr/lib/", "usr/lib/a==b"}},
		// The content must not go with the directory that held its other name.
		"hard link replaces its target's directory": {
			[]entries{{file("d/x", strings.Repeat("1", 9000))}, {hard("d", "d/x")}},
			[]string{"d=" + strings.Repeat("1", 9000)},
		},
		"through a link": {
			[]entries{{dir("usr/lib"), link("lib", "usr/lib")}, {file("lib/a", "1")}},
			[]string{"lib->usr/lib", "usr/", "usr/lib/", "usr/lib/a=1"},
		},
		"through an absolute link": {
			[]entries{{dir("usr/lib"), link("lib", "/usr/lib")}, {file("lib/a", "1"), gone("lib/.wh.b")}},
			[]string{"lib->/usr/lib", "usr/", "usr/lib/", "usr/lib/a=1"},
		},
		"through a dangling link": {
			[]entries{{link("run", "var/run")}, {file("run/a", "1")}},
			[]string{"run->var/run", "var/", "var/run/", "var/run/a=1"},
		},
		"whiteout through a link": {
			[]entries{{file("usr/lib/a", "1"), link("lib", "usr/lib")}, {gone("lib/.wh.a")}},
			[]string{"lib->usr/lib", "usr/", "usr/lib/"},
		},
		// None of these leads out of the image.
		"link to the host":       {[]entries{{link("x", "/"), file("x/etc/passwd", "1")}}, []string{"etc/", "etc/passwd=1", "x->/"}},
		"link above the root":    {[]entries{{link("x", "../../../.."), file("x/etc/passwd", "1")}}, []string{"etc/", "etc/passwd=1", "x->../../../.."}},
		"link above, from below": {[]entries{{dir("a/b"), link("a/b/x", "../../../../tmp"), file("a/b/x/y", "1")}}, []string{"a/", "a/b/", "a/b/x->../../../../tmp", "tmp/", "tmp/y=1"}},
		"hard link above":        {[]entries{{link("x", "/.."), file("f", "1"), hard("g", "x/f")}}, []string{"f=1", "g==f", "x->/.."}},
		"dots inside":            {[]entries{{file("a/../b", "1"), file("c/../d", "2")}}, []string{"b=1", "d=2"}},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, archive(t, l...))
			}
			path, err := build(t, rootfs.Limits{}, layers...)
			if err != nil {
				t.Fatal(err)
			}
			files, err := erofstest.Read(path)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, show(files)); d != "" {
				t.Errorf("tree (-want +got):\n%s", d)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	loop := entries{link("a", "b"), link("b", "a"), file("a/x", "1")}
	pax := func(h tar.Header, k, v string) tar.Header {
		h.PAXRecords = map[string]string{k: v}
		return h
	}
	owner := file("f", "")
	owner.Uid = 1<<32 - 1
	for name, c := range map[string]struct {
		layers []entries
		want   string // in the message
	}{
		"parent of the root":      {[]entries{{file("../x", "1")}}, "leaves the root"},
		"far up":                  {[]entries{{file("a/../../../etc/passwd", "1")}}, "leaves the root"},
		"the parent itself":       {[]entries{{dir("..")}}, "leaves the root"},
		"absolute and up":         {[]entries{{file("/../x", "1")}}, "leaves the root"},
		"hard link up":            {[]entries{{hard("x", "../../etc/passwd")}}, "leaves the root"},
		"hard link to the host":   {[]entries{{hard("x", "/etc/passwd")}}, "not a file of this image"},
		"hard link via a link":    {[]entries{{link("h", "/etc"), hard("x", "h/passwd")}}, "not a file of this image"},
		"hard link to a dir":      {[]entries{{dir("d"), hard("x", "d")}}, "not a file of this image"},
		"hard link to the root":   {[]entries{{hard("x", "/")}}, "not a file of this image"},
		"hard link before target": {[]entries{{hard("x", "y"), file("y", "1")}}, "not a file of this image"},
		"hard link is the root":   {[]entries{{file("f", ""), hard("/", "f")}}, "replace the root"},
		"file as root":            {[]entries{{file(".", "")}}, "replace the root"},
		"link as root":            {[]entries{{link(".", "/etc")}}, "replace the root"},
		"whiteout without a name": {[]entries{{file("d/a", "1")}, {gone("d/.wh.")}}, "hides nothing"},
		"whiteout of dot":         {[]entries{{file("d/a", "1")}, {gone("d/.wh..")}}, "hides nothing"},
		"whiteout of dot dot":     {[]entries{{file("d/a", "1")}, {gone("d/.wh...")}}, "hides nothing"},
		"whiteout up":             {[]entries{{gone("../.wh.etc")}}, "leaves the root"},
		"link loop":               {[]entries{loop}, "too many symbolic links"},
		"file as parent":          {[]entries{{file("a", "1"), file("a/b", "2")}}, "not a directory"},
		"empty link":              {[]entries{{link("l", "")}}, "symbolic link"},
		"long component":          {[]entries{{file(strings.Repeat("n", 256), "")}}, "longer than 255"},
		"long name":               {[]entries{{file(strings.Repeat("n/", 2100)+"x", "")}}, "name of 4201 bytes"},
		"owner":                   {[]entries{{owner}}, "owner"},
		"negative owner":          {[]entries{{{Typeflag: tar.TypeReg, Name: "f", Gid: -1, Format: tar.FormatGNU}}}, "owner"},
		"device number":           {[]entries{{{Typeflag: tar.TypeChar, Name: "c", Devmajor: 4096}}}, "device"},
		"unknown type":            {[]entries{{{Typeflag: 'Z', Name: "f"}}}, "unknown type"},
		"huge attribute":          {[]entries{{pax(file("f", ""), "SCHILY.xattr.user.x", strings.Repeat("v", 40000))}}, "too large"},
		"long attribute":          {[]entries{{pax(file("f", ""), "SCHILY.xattr.user."+strings.Repeat("n", 255), "v")}}, "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, archive(t, l...))
			}
			_, err := build(t, rootfs.Limits{}, layers...)
			if !errors.Is(err, rootfs.ErrLayer) || !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	many := entries{}
	for n := range 20 {
		many = append(many, file(fmt.Sprint("f", n), "12345"))
	}
	l := archive(t, many...)
	for name, c := range map[string]struct {
		limits rootfs.Limits
		layers int
		want   string
	}{
		"fits":            {rootfs.Limits{Entries: 20, Bytes: 100}, 1, ""},
		"entries":         {rootfs.Limits{Entries: 19}, 1, "more than 19 files"},
		"bytes":           {rootfs.Limits{Bytes: 99}, 1, "more than 99 bytes"},
		"replaced counts": {rootfs.Limits{Bytes: 150}, 2, "more than 150 bytes"},
		"replaced frees":  {rootfs.Limits{Entries: 20}, 3, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := build(t, c.limits, slices.Repeat([][]byte{l}, c.layers)...)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
			} else if !errors.Is(err, rootfs.ErrLayer) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}

// A deep tree that is built through links must fail, not exhaust the stack.
func TestDepth(t *testing.T) {
	var l entries
	at := strings.Repeat("d/", 1000)
	l = append(l, dir(at))
	for n := range 30 {
		l = append(l, link(fmt.Sprint("l", n), at))
		at = fmt.Sprint("l", n) + "/" + strings.Repeat("d/", 1000)
		l = append(l, dir(at))
	}
	if _, err := build(t, rootfs.Limits{}, archive(t, l...)); !errors.Is(err, rootfs.ErrLayer) {
		t.Errorf("error is %v", err)
	}
}

func TestMetadata(t *testing.T) {
	when := time.Date(2020, 1, 2, 3, 4, 5, 600, time.UTC)
	with := func(h tar.Header, mode int64, uid, gid int, xattrs map[string]string) tar.Header {
		h.Mode, h.Uid, h.Gid, h.ModTime, h.Format = mode, uid, gid, when, tar.FormatPAX
		for k, v := range xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		return h
	}
	caps := map[string]string{"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}
	dropped := map[string]string{"user.keep": "1", "trusted.overlay.opaque": "y", "user.overlay.redirect": "/etc", "system.nfs4_acl": "x", "com.apple.x": "x"}
	path, err := build(t, rootfs.Limits{}, archive(t,
		with(dir("."), 0o1750, 1, 2, nil),
		with(file("su", "#!"), 0o4755, 3, 4, caps),
		with(file("acl", ""), 0o600, 100000, 1<<32-2, dropped),
		with(tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Devmajor: 1, Devminor: 3}, 0o666, 0, 0, nil),
		with(tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Devmajor: 8, Devminor: 300}, 0o660, 0, 6, nil),
		with(tar.Header{Typeflag: tar.TypeFifo, Name: "pipe"}, 0o620, 0, 0, nil),
		with(link("l", "su"), 0o777, 9, 9, nil),
	), archive(t, with(dir("dev"), 0o2700, 7, 7, nil)))
	if err != nil {
		t.Fatal(err)
	}
	got := erofstest.Check(t, path)
	want := map[string]erofstest.File{
		".":        {Mode: fs.ModeDir | fs.ModeSticky | 0o750, UID: 1, GID: 2, Links: 3},
		"su":       {Mode: fs.ModeSetuid | 0o755, UID: 3, GID: 4, Links: 1, Data: "#!", Xattrs: caps},
		"acl":      {Mode: 0o600, UID: 100000, GID: 1<<32 - 2, Links: 1, Xattrs: map[string]string{"user.keep": "1"}},
		"dev":      {Mode: fs.ModeDir | fs.ModeSetgid | 0o700, UID: 7, GID: 7, Links: 2},
		"dev/null": {Mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, Links: 1, Rdev: 1<<8 | 3},
		"dev/sda":  {Mode: fs.ModeDevice | 0o660, GID: 6, Links: 1, Rdev: 8<<8 | 300&0xff | 300&^0xff<<12},
		"pipe":     {Mode: fs.ModeNamedPipe | 0o620, Links: 1},
		"l":        {Mode: fs.ModeSymlink | 0o777, UID: 9, GID: 9, Links: 1, Target: "su"},
	}
	for name, f := range want {
		f.Same, f.MTime = name, when
		want[name] = f
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

// What upper layers replace takes no disk space.
func TestReplacedContentIsFreed(t *testing.T) {
	big := strings.Repeat("x", 4<<20)
	path, err := build(t, rootfs.Limits{}, archive(t, file("a", big), file("d/b", big), file("c", big)),
		archive(t, file("a", "small"), gone(".wh.d"), hard("keep", "c"), gone(".wh.c")))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, bytes.Repeat([]byte("x"), 1<<20)); n != 4 {
		t.Errorf("the file system has %d MiB of content, want the 4 of one file", n)
	}
	files, err := erofstest.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if files["keep"].Data != big {
		t.Error("content of a file with another name was freed")
	}
}

func TestBrokenArchive(t *testing.T) {
	whole := archive(t, file("a", strings.Repeat("x", 5000)), file("b", "y"))
	for name, l := range map[string][]byte{
		"cut in content": whole[:2000],
		"cut in header":  whole[:700+5120],
		"no archive":     bytes.Repeat([]byte("text"), 1000),
		"bad checksum":   append([]byte("z"), whole[1:]...),
	} {
		if _, err := build(t, rootfs.Limits{}, l); !errors.Is(err, rootfs.ErrLayer) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	tmp := t.TempDir()
	b := rootfs.New(open(t, tmp, "image"), open(t, tmp, "spool"), rootfs.Limits{})
	if err := b.Apply(ctx, bytes.NewReader(archive(t, file("a", "1")))); !errors.Is(err, context.Canceled) {
		t.Errorf("Apply: %v", err)
	}
}

// FuzzApply merges two hostile layers. Whatever Apply accepts must be a file
// system that another implementation can read.
func FuzzApply(f *testing.F) {
	f.Add(archive(f, dir("d"), file("d/a", "1"), link("l", "/d"), hard("h", "d/a")), archive(f, gone("d/.wh.a"), file("l/b", "2")))
	f.Add(archive(f, file("a", strings.Repeat("1", 5000)), tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1}), archive(f, gone(".wh..wh..opq"), file("x/../../y", "")))
	f.Add(archive(f, link("a", "b"), link("b", "a"), file("a/x", "")), archive(f, hard("d", "d/x")))
	f.Add(archive(f, tar.Header{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}), []byte{})
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		path, err := build(t, rootfs.Limits{Entries: 200, Bytes: 1 << 20}, lower, upper)
		if err != nil {
			if errors.Is(err, erofs.ErrFormat) {
				t.Fatalf("accepted, but can't be stored: %v", err)
			}
			return
		}
		if _, err := erofstest.Read(path); err != nil {
			t.Fatalf("read: %v", err)
		}
	})
}
