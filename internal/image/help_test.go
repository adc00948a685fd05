package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"fcvm/internal/image/erofs/erofstest"
	"fcvm/test/images"
)

// newStore opens a store that does not wait between attempts.
func newStore(t testing.TB) *Store {
	t.Helper()
	return openStore(t, t.TempDir())
}

func openStore(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.backoff = remote.Backoff{Duration: time.Millisecond, Factor: 1, Steps: 2}
	return s
}

// tarOf writes a layer of files; names that end with a slash are directories.
func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		data := files[name]
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if err := w.WriteHeader(h); err != nil {
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

// imageOf makes an image for a platform of uncompressed layers.
func imageOf(t testing.TB, platform string, layers ...[]byte) v1.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, b := range layers {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, _ = strings.Cut(platform, "/")
	cf.Config.Cmd = []string{"/app"}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

// simple is an image of two layers; content makes it different from others.
func simple(t testing.TB, content string) v1.Image {
	t.Helper()
	return imageOf(t, "linux/amd64",
		tarOf(t, map[string]string{"app": content, "old": "hidden"}),
		tarOf(t, map[string]string{"etc/name": content, ".wh.old": ""}))
}

func digest(t testing.TB, img interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// serve starts a registry; wrap, when not nil, stands before it.
func serve(t testing.TB, wrap func(http.Handler) http.Handler) *images.Registry {
	t.Helper()
	if wrap == nil {
		wrap = func(h http.Handler) http.Handler { return h }
	}
	r, err := images.ServeHandler(context.Background(), wrap)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func push(t testing.TB, r *images.Registry, ref string, img v1.Image) string {
	t.Helper()
	if err := r.Push(context.Background(), ref, img); err != nil {
		t.Fatal(err)
	}
	return r.Addr() + "/" + ref
}

// content reads the files of an image in the store.
func content(t testing.TB, img *Image) map[string]string {
	t.Helper()
	files, err := erofstest.Read(img.RootFS)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, f := range files {
		if f.Mode.IsRegular() {
			out[name] = f.Data
		}
	}
	return out
}

// left lists what is in the store's directory but its locks and refs.json.
func left(t testing.TB, s *Store) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(s.dir, path)
		if err != nil {
			return err
		}
		switch name {
		case ".", refsFile, refsLock, tempLock, tempDir, locksDir:
		default:
			out = append(out, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// nothingLeft fails the test if the store has anything in it.
func nothingLeft(t testing.TB, s *Store) {
	t.Helper()
	if l := left(t, s); len(l) > 0 {
		t.Errorf("left behind: %v", l)
	}
	refs, err := s.readRefs()
	if err != nil {
		t.Fatal(err)
	}
	if len(refs) > 0 {
		t.Errorf("names left behind: %v", refs)
	}
}

func TestMain(m *testing.M) {
	if f, ok := children[os.Getenv("IMAGE_TEST_CHILD")]; ok {
		if err := f(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The user's own credentials are none of a test's business.
	for _, v := range []string{"DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		_ = os.Unsetenv(v)
	}
	_ = os.Setenv("HOME", "/nonexistent")
	os.Exit(m.Run())
}
