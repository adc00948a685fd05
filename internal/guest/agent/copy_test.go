package agent_test

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/guesttest"
)

func TestCopyIn(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	file := tar.Header{Name: "f"}
	tree := []tar.Header{
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o750},
		{Name: "d/sub/", Typeflag: tar.TypeDir},
		{Name: "d/sub/f", Mode: 0o4711},
		{Name: "d/link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		{Name: "d/hard", Typeflag: tar.TypeLink, Linkname: "d/sub/f"},
		{Name: "d/fifo", Typeflag: tar.TypeFifo, Mode: 0o600},
	}
	dot := []tar.Header{{Name: "./", Typeflag: tar.TypeDir}, {Name: "./x"}}
	// As `docker cp` documents it: https://docs.docker.com/reference/cli/docker/container/cp/
	for name, tc := range map[string]struct {
		in   []tar.Header
		dest string // below a directory that has a directory "dir" and a file "file"
		file string // what must be there then, or "" for an error
		from string // the entry whose content it has
	}{
		"file into directory":           {[]tar.Header{file}, "dir", "dir/f", "f"},
		"file into directory with /":    {[]tar.Header{file}, "dir/", "dir/f", "f"},
		"file under new name":           {[]tar.Header{file}, "new", "new", "f"},
		"file over file":                {[]tar.Header{file}, "file", "file", "f"},
		"file to no directory":          {[]tar.Header{file}, "none/", "", ""},
		"file below no directory":       {[]tar.Header{file}, "none/new", "", ""},
		"file to file with /":           {[]tar.Header{file}, "file/", "", ""},
		"directory into directory":      {tree, "dir", "dir/d/sub/f", "d/sub/f"},
		"directory under new name":      {tree, "new", "new/sub/f", "d/sub/f"},
		"directory under new name, /":   {tree, "new/", "new/hard", "d/sub/f"},
		"directory over file":           {tree, "file", "", ""},
		"content into directory":        {dot, "dir", "dir/x", "./x"},
		"content under new name":        {dot, "new", "new/x", "./x"},
		"nothing":                       {nil, "dir", "", ""},
		"entry outside":                 {[]tar.Header{file, {Name: "g"}}, "dir", "", ""},
		"entry above":                   {[]tar.Header{{Name: "../f"}}, "dir", "", ""},
		"entry above, later":            {[]tar.Header{{Name: "./", Typeflag: tar.TypeDir}, {Name: "./../f"}}, "dir", "", ""},
		"through a link":                {[]tar.Header{{Name: "d/", Typeflag: tar.TypeDir}, {Name: "d/l", Typeflag: tar.TypeSymlink, Linkname: "../.."}, {Name: "d/l/f"}}, "dir", "", ""},
		"hard link to the outside":      {[]tar.Header{{Name: "d/", Typeflag: tar.TypeDir}, {Name: "d/l", Typeflag: tar.TypeLink, Linkname: "../file"}}, "dir", "", ""},
		"directory over its directory":  {append(tree[:1:1], tree...), "dir", "dir/d/sub/f", "d/sub/f"},
		"link in the place of the file": {[]tar.Header{{Name: "f", Typeflag: tar.TypeSymlink, Linkname: "../file"}, {Name: "f"}}, "dir", "dir/f", "f"},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			if err := os.Mkdir(filepath.Join(base, "dir"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(base, "file"), []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			err := c.CopyIn(timeout(t), base+"/"+tc.dest, tarOf(t, tc.in...))
			if tc.file == "" {
				var e *agent.Error
				if !errors.As(err, &e) {
					t.Fatalf("CopyIn = %v, want an error of the agent", err)
				}
				if b, err := os.ReadFile(filepath.Join(base, "file")); string(b) != "old" {
					t.Errorf("a file outside was changed: %q, %v", b, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(base, tc.file)); err != nil || string(b) != "content of "+tc.from {
				t.Errorf("%s = %q, %v", tc.file, b, err)
			}
		})
	}
}

func TestCopyKeepsAttributes(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	base := t.TempDir()
	in := tarOf(t,
		tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o710},
		tar.Header{Name: "d/f", Mode: 0o4711},
		tar.Header{Name: "d/l", Typeflag: tar.TypeSymlink, Linkname: "nowhere", Mode: 0o777})
	if err := c.CopyIn(timeout(t), base, in); err != nil {
		t.Fatal(err)
	}
	out, err := c.CopyOut(timeout(t), base+"/d")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	got := map[string]tar.Header{}
	for r := tar.NewReader(out); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = *h
	}
	for name, mode := range map[string]int64{"d/": 0o710, "d/f": 0o4711} {
		h := got[name]
		if h.Mode != mode || h.ModTime.Unix() != 1_700_000_000 || h.Uid != os.Getuid() {
			t.Errorf("%s: mode %o, time %v, uid %d", name, h.Mode, h.ModTime, h.Uid)
		}
	}
	if got["d/l"].Linkname != "nowhere" || len(got) != 3 {
		t.Errorf("got %d entries, link to %q", len(got), got["d/l"].Linkname)
	}
}

func TestCopyOut(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	base := t.TempDir()
	big := strings.Repeat("x", 1_000_000)
	for name, content := range map[string]string{"d/a": big, "d/sub/b": "b"} {
		path := filepath.Join(base, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("d", filepath.Join(base, "l")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string][]string{
		"d":     {"d/", "d/a", "d/sub/", "d/sub/b"},
		"d/":    {"d/", "d/a", "d/sub/", "d/sub/b"},
		"d/.":   {"./", "a", "sub/", "sub/b"},
		"d/a":   {"d/a"},
		"l":     {"l"},
		"l/":    {"l/", "l/a", "l/sub/", "l/sub/b"},
		"l/.":   {"./", "a", "sub/", "sub/b"},
		"d/a/":  nil,
		"d/no":  nil,
		"./d/a": {"d/a"},
	} {
		t.Run(path, func(t *testing.T) {
			out, err := c.CopyOut(timeout(t), base+"/"+path)
			if want == nil {
				var e *agent.Error
				if !errors.As(err, &e) {
					t.Fatalf("CopyOut = %v, want an error of the agent", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			var got []string
			r := tar.NewReader(out)
			for {
				h, err := r.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, h.Name)
				if n, err := io.Copy(io.Discard, r); err != nil || n != h.Size {
					t.Errorf("%s: %d bytes of %d, %v", h.Name, n, h.Size, err)
				}
			}
			if path == "d/a" || path == "./d/a" {
				want = []string{"a"}
			}
			if strings.Join(got, " ") != strings.Join(want, " ") {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
	if _, err := c.CopyOut(timeout(t), "relative"); err == nil {
		t.Error("a relative path was no error")
	}
}

// A source that fails must not look like a file that was copied.
func TestCopyInBrokenSource(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	dir := t.TempDir()
	broken := errors.New("disk on fire")
	in := io.MultiReader(io.LimitReader(tarOf(t, tar.Header{Name: "f"}), 600), failing{broken})
	if err := c.CopyIn(timeout(t), dir, in); !errors.Is(err, broken) {
		t.Errorf("CopyIn = %v, want %v", err, broken)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
