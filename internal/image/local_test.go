package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"

	"fcvm/test/images"
)

// layoutOf writes an OCI layout with images by their names in the index.
func layoutOf(t testing.TB, byName map[string]v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	first := true
	for _, n := range slices.Sorted(mapKeys(byName)) {
		if first {
			if err := images.WriteOCI(dir, byName[n], n); err != nil {
				t.Fatal(err)
			}
			first = false
			continue
		}
		p, err := layout.FromPath(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(byName[n], layout.WithAnnotations(map[string]string{refAnnotation: n})); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func mapKeys(m map[string]v1.Image) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// pack writes the directory as an archive, names starting with prefix.
func pack(t testing.TB, dir, prefix string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: prefix + rel, Size: int64(len(data)), Mode: 0o644}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// What is not of the layout must not be unpacked anywhere.
	for _, evil := range []string{"../evil", "/evil", "blobs/sha256/../../../evil"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: evil}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return write(t, b.Bytes())
}

func write(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive.tar")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func compress(t testing.TB, path, how string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if how == "gzip" {
		w := gzip.NewWriter(&b)
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	} else {
		w, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return write(t, b.Bytes())
}

// save writes an archive as `docker save` does.
func save(t testing.TB, byTag map[string]v1.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "saved.tar")
	refs := map[name.Tag]v1.Image{}
	for n, img := range byTag {
		tag, err := name.NewTag(n)
		if err != nil {
			t.Fatal(err)
		}
		refs[tag] = img
	}
	if err := tarball.MultiWriteToFile(path, refs); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPullLocal(t *testing.T) {
	a, b := simple(t, "a"), simple(t, "b")
	arm := imageOf(t, "linux/arm64", tarOf(t, map[string]string{"app": "arm"}))
	one := layoutOf(t, map[string]v1.Image{"v1": a})
	two := layoutOf(t, map[string]v1.Image{"v1": a, "docker.io/me/app:v2": b})
	saved := save(t, map[string]v1.Image{"me/app:v1": a, "me/app:v2": b})
	single := save(t, map[string]v1.Image{"me/app:v1": a})
	for name, c := range map[string]struct {
		ref, content string
		is           error
		want         string // in the error
	}{
		"layout":                    {"oci:" + one, "a", nil, ""},
		"layout and tag":            {"oci:" + one + ":v1", "a", nil, ""},
		"layout, unknown tag":       {"oci:" + one + ":v9", "", ErrUnknown, "only v1"},
		"layout of two":             {"oci:" + two, "", ErrAmbiguous, "docker.io/me/app:v2"},
		"layout of two, tag":        {"oci:" + two + ":v1", "a", nil, ""},
		"layout of two, other tag":  {"oci:" + two + ":v2", "b", nil, ""},
		"layout, other platform":    {"oci:" + layoutOf(t, map[string]v1.Image{"v1": arm}), "", ErrNoPlatform, "linux/arm64"},
		"no layout":                 {"oci:" + t.TempDir(), "", ErrUnknown, "index.json"},
		"nothing there":             {"oci:/nonexistent/dir", "", ErrUnknown, "/nonexistent/dir"},
		"OCI archive":               {"oci-archive:" + pack(t, one, ""), "a", nil, ""},
		"OCI archive, dots":         {"oci-archive:" + pack(t, one, "./") + ":v1", "a", nil, ""},
		"OCI archive, gzip":         {"oci-archive:" + compress(t, pack(t, one, ""), "gzip"), "a", nil, ""},
		"OCI archive, zstd":         {"oci-archive:" + compress(t, pack(t, one, ""), "zstd"), "a", nil, ""},
		"OCI archive, missing":      {"oci-archive:/nonexistent/a.tar", "", ErrUnknown, "/nonexistent/a.tar"},
		"docker archive":            {"docker-archive:" + single, "a", nil, ""},
		"docker archive, gzip":      {"docker-archive:" + compress(t, single, "gzip"), "a", nil, ""},
		"docker archive of two":     {"docker-archive:" + saved, "", ErrAmbiguous, "me/app:v2"},
		"docker archive, name":      {"docker-archive:" + saved + ":me/app:v2", "b", nil, ""},
		"docker archive, no name":   {"docker-archive:" + saved + ":me/app:v3", "", ErrUnknown, "me/app:v1"},
		"docker archive of nothing": {"docker-archive:" + write(t, tarOf(t, map[string]string{"x": "y"})), "", ErrCorrupt, "manifest.json"},
		"docker archive, other":     {"docker-archive:" + save(t, map[string]v1.Image{"a:1": arm}), "", ErrNoPlatform, "linux/arm64"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			img, err := s.Pull(context.Background(), c.ref, PullOptions{})
			if c.is != nil {
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error is %v, want %q", err, c.want)
				}
				nothingLeft(t, s)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(map[string]string{"app": c.content, "etc/name": c.content}, content(t, img)); d != "" {
				t.Errorf("content: %s", d)
			}
			if d := cmp.Diff([]string{c.ref}, img.Refs); d != "" {
				t.Errorf("names: %s", d)
			}
			if again, err := s.Pull(context.Background(), c.ref, PullOptions{Policy: PullNever}); err != nil || again.ID != img.ID {
				t.Errorf("never: %v %v", again, err)
			}
			if l := left(t, s); len(l) != 4 {
				t.Errorf("the store has %v", l)
			}
		})
	}
}

// A layout that changed is read again, also where the policy is "missing".
func TestLayoutChanges(t *testing.T) {
	s := newStore(t)
	dir := layoutOf(t, map[string]v1.Image{"v1": simple(t, "a")})
	if _, err := s.Pull(context.Background(), "oci:"+dir, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	b := simple(t, "b")
	if err := images.WriteOCI(dir, b, "v1"); err != nil {
		t.Fatal(err)
	}
	img, err := s.Pull(context.Background(), "oci:"+dir, PullOptions{})
	if err != nil || img.ID != digest(t, b) {
		t.Errorf("%v %v", img, err)
	}
}

func TestLoad(t *testing.T) {
	a, b := simple(t, "a"), simple(t, "b")
	saved := save(t, map[string]v1.Image{"me/app:v1": a, "localhost:5000/app:v2": b})
	dir := layoutOf(t, map[string]v1.Image{"v1": a, "quay.io/me/app:v2": b})
	archive := pack(t, dir, "")
	for path, want := range map[string][]string{
		saved:                      {"localhost:5000/app:v2", "me/app:v1"},
		"docker-archive:" + saved:  {"localhost:5000/app:v2", "me/app:v1"},
		dir:                        {"oci:" + dir + ":v1", "quay.io/me/app:v2"},
		"oci:" + dir:               {"oci:" + dir + ":v1", "quay.io/me/app:v2"},
		archive:                    {"oci-archive:" + archive + ":v1", "quay.io/me/app:v2"},
		compress(t, saved, "zstd"): {"localhost:5000/app:v2", "me/app:v1"},
	} {
		s := newStore(t)
		all, err := s.Load(context.Background(), path, PullOptions{})
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		var names []string
		for _, img := range all {
			names = append(names, img.Refs...)
		}
		slices.Sort(names)
		if d := cmp.Diff(want, names); d != "" {
			t.Errorf("%s: names: %s", path, d)
		}
	}
	for path, want := range map[string]error{
		"/nonexistent": ErrUnknown,
		write(t, tarOf(t, map[string]string{"x": "y"})):   ErrCorrupt,
		write(t, bytes.Repeat([]byte("text"), 1000)):      ErrCorrupt,
		write(t, []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0}): ErrCorrupt,
		write(t, nil): ErrCorrupt,
	} {
		s := newStore(t)
		if _, err := s.Load(context.Background(), path, PullOptions{}); !errors.Is(err, want) {
			t.Errorf("%s: %v", path, err)
		}
		nothingLeft(t, s)
	}
}

// Every blob of a layout is verified.
func TestDamagedLayout(t *testing.T) {
	img := simple(t, "a")
	probe := layoutOf(t, map[string]v1.Image{"v1": img})
	blobs, err := filepath.Glob(filepath.Join(probe, "blobs", "sha256", "*"))
	if err != nil || len(blobs) != 4 {
		t.Fatal(blobs, err)
	}
	for _, blob := range blobs {
		for name, damage := range map[string]func(path string, b []byte) error{
			"other byte": func(path string, b []byte) error { b[len(b)/2] ^= 1; return os.WriteFile(path, b, 0o600) },
			"cut":        func(path string, b []byte) error { return os.WriteFile(path, b[:len(b)/2], 0o600) },
			"longer":     func(path string, b []byte) error { return os.WriteFile(path, append(b, 0), 0o600) },
			"missing":    func(path string, _ []byte) error { return os.Remove(path) },
		} {
			dir := layoutOf(t, map[string]v1.Image{"v1": img})
			path := filepath.Join(dir, "blobs", "sha256", filepath.Base(blob))
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := damage(path, b); err != nil {
				t.Fatal(err)
			}
			want := ErrCorrupt
			if name == "missing" {
				want = ErrUnknown
			}
			s := newStore(t)
			if _, err := s.Pull(context.Background(), "oci:"+dir, PullOptions{}); !errors.Is(err, want) || !strings.Contains(err.Error(), filepath.Base(blob)) {
				t.Errorf("%s of %s: %v", name, filepath.Base(blob), err)
			}
			nothingLeft(t, s)
		}
	}
}

// Archives of older dockers link equal layers.
func TestDockerArchiveLinks(t *testing.T) {
	layer := tarOf(t, map[string]string{"a": "1"})
	diff := digestOf(layer)
	config, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{diff, diff}}})
	if err != nil {
		t.Fatal(err)
	}
	build := func(target string) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range []struct {
			name string
			data []byte
		}{
			{"manifest.json", []byte(`[{"Config":"c.json","RepoTags":["old:1"],"Layers":["x/layer.tar","y/layer.tar"]}]`)},
			{"c.json", config},
			{"x/layer.tar", layer},
		} {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Size: int64(len(f.data))}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(f.data); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "y/layer.tar", Linkname: target}); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return write(t, b.Bytes())
	}
	s := newStore(t)
	all, err := s.Load(context.Background(), build("../x/layer.tar"), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]string{"a": "1"}, content(t, all[0])); d != "" || all[0].Refs[0] != "old:1" {
		t.Errorf("%v %s", all[0].Refs, d)
	}
	for _, bad := range []string{"../y/layer.tar", "/etc/passwd", "../../../etc/passwd"} {
		s := newStore(t)
		if _, err := s.Load(context.Background(), build(bad), PullOptions{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("link to %s: %v", bad, err)
		}
		nothingLeft(t, s)
	}
}

// FuzzDockerArchive opens hostile archives of `docker save`.
func FuzzDockerArchive(f *testing.F) {
	good, err := os.ReadFile(save(f, map[string]v1.Image{"a:1": simple(f, "x")}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(tarOf(f, map[string]string{"manifest.json": `[{"Config":"manifest.json","RepoTags":["UPPER"],"Layers":[]}]`}))
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := os.Open(write(t, b))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = file.Close() }()
		a, err := openSaved(context.Background(), file)
		if err != nil {
			return
		}
		all, err := a.images(context.Background(), reference{prefix: dockerArchive, path: "/x"}, v1.Platform{OS: "linux", Architecture: "amd64"})
		if err != nil {
			return
		}
		for _, i := range all {
			if !idPattern.MatchString(i.id) || len(i.names) == 0 {
				t.Errorf("accepted: %+v", i)
			}
		}
	})
}

// FuzzLayout reads hostile documents: an index and, as its only blob, whatever
// it wants.
func FuzzLayout(f *testing.F) {
	dir := layoutOf(f, map[string]v1.Image{"v1": simple(f, "x")})
	idx, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(idx, []byte("{}"))
	f.Add(idx, []byte(`{"schemaVersion":2,"config":{"digest":"sha256:`+strings.Repeat("0", 64)+`","size":2},"layers":[]}`))
	f.Add([]byte(`{"manifests":[{"digest":"sha512:00","size":-1,"annotations":{"org.opencontainers.image.ref.name":"../../x"}}]}`), []byte{})
	f.Fuzz(func(t *testing.T, index, blob []byte) {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700); err != nil {
			t.Fatal(err)
		}
		sum := digestOf(blob)
		index = bytes.ReplaceAll(index, []byte("sha256:"+strings.Repeat("0", 64)), []byte(sum))
		for name, b := range map[string][]byte{"index.json": index, "blobs/sha256/" + sum[7:]: blob} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		all, err := ociLayout{dir}.images(context.Background(), reference{prefix: layoutPrefix, path: dir}, v1.Platform{OS: "linux", Architecture: "amd64"})
		if err == nil && len(all) == 0 {
			t.Error("no images and no error")
		}
	})
}

// FuzzRefs reads hostile refs.json: what is accepted leads to image directories
// and nowhere else.
func FuzzRefs(f *testing.F) {
	f.Add([]byte(`{"version":1,"refs":{"docker.io/library/a:1":"sha256:` + strings.Repeat("0", 64) + `"}}`))
	f.Add([]byte(`{"version":1,"refs":{"a":"../x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		refs, err := parseRefs(b, "refs.json")
		if err != nil {
			return
		}
		for n, id := range refs {
			if !dirPattern.MatchString(dirName(id)) {
				t.Errorf("%q leads to %q", n, id)
			}
		}
	})
}

// FuzzReference parses names; what it accepts it accepts again in full.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"nginx", "a/b:c", "localhost:5000/a@sha256:" + strings.Repeat("0", 64), "oci:/x:y", "docker-archive:a:b:c", "[::1]:1/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseReference(s)
		if err != nil {
			return
		}
		again, err := parseReference(r.String())
		if err != nil || r.prefix == "" && again.String() != r.String() {
			t.Errorf("%q is %q, and that is %v (%v)", s, r, again, err)
		}
	})
}
