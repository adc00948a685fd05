package release

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/download"
)

const version = "9.8.7"

// archive makes a release as the project publishes them.
func archive(t testing.TB, programs map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	top := "release-v" + version + "-x86_64/"
	put := func(h tar.Header, body string) {
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	put(tar.Header{Name: top, Typeflag: tar.TypeDir, Mode: 0o755}, "")
	put(tar.Header{Name: top + "LICENSE", Typeflag: tar.TypeReg, Mode: 0o644}, "free")
	for name, body := range programs {
		put(tar.Header{Name: top + name + "-v" + version + "-x86_64", Typeflag: tar.TypeReg, Mode: 0o755}, body)
		put(tar.Header{Name: top + name + "-v" + version + "-x86_64.debug", Typeflag: tar.TypeReg, Mode: 0o755}, "symbols")
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func programs() map[string]string {
	return map[string]string{"firecracker": "#!/bin/sh\necho " + strings.Repeat("firecracker ", 5000), "jailer": "#!/bin/sh\necho jailer"}
}

func pinOf(b []byte) pin {
	s := sha256.Sum256(b)
	return pin{version, hex.EncodeToString(s[:])}
}

// web serves b, and tells how often it was asked.
func web(t *testing.T, serve http.HandlerFunc) (url string, asked *[]string) {
	t.Helper()
	asked = new([]string)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = append(*asked, r.Header.Get("Range"))
		serve(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL + "/firecracker.tgz", asked
}

func whole(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.tgz", time.Time{}, bytes.NewReader(b))
	}
}

// clean fails the test when something unfinished lies about.
func clean(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func checkInstalled(t *testing.T, dir string) {
	t.Helper()
	i, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if i.Version != version || filepath.Base(i.Firecracker) != "firecracker" || !filepath.IsAbs(i.Firecracker) {
		t.Errorf("got %+v", i)
	}
	for name, p := range map[string]string{"firecracker": i.Firecracker, "jailer": i.Jailer} {
		b, err := os.ReadFile(p)
		if err != nil || string(b) != programs()[name] {
			t.Errorf("%s has %d bytes, %v", p, len(b), err)
		}
		if fi, err := os.Stat(p); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: mode %v, %v", p, fi.Mode(), err)
		}
	}
	clean(t, dir)
}

func TestPinned(t *testing.T) {
	if len(archiveSum) != 2*sha256.Size || !strings.Contains(URL, "/v"+Version+"/firecracker-v"+Version+"-x86_64.tgz") {
		t.Errorf("sum %q of %s", archiveSum, URL)
	}
}

func TestInstall(t *testing.T) {
	b := archive(t, programs())
	url, asked := web(t, whole(b))
	o := Options{Dir: filepath.Join(t.TempDir(), "firecracker"), Archive: url, pin: pinOf(b)}
	var done, total int64
	o.Progress = func(stage string, d, n int64) {
		if strings.HasPrefix(stage, "download") {
			done, total = d, n
		}
	}
	if _, err := Open(o.Dir); !errors.Is(err, ErrNone) {
		t.Errorf("Open before = %v", err)
	}
	if _, err := Install(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, o.Dir)
	if done != int64(len(b)) || total != done {
		t.Errorf("progress ended at %d of %d", done, total)
	}
	// Again: nothing is to be done.
	if _, err := Install(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if len(*asked) != 1 {
		t.Errorf("the server was asked %d times", len(*asked))
	}
	// What was damaged is made anew.
	i, err := Open(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(i.Jailer, []byte("another"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Install(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, o.Dir)
	// As what is missing is.
	if err := os.Remove(i.Firecracker); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(o.Dir); !errors.Is(err, ErrNone) {
		t.Errorf("Open without Firecracker = %v", err)
	}
	if _, err := Install(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, o.Dir)
}

func TestInterruptedAndResumed(t *testing.T) {
	b := archive(t, programs())
	broken := true
	url, asked := web(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !broken:
			whole(b)(w, r)
		case r.Header.Get("Range") != "":
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(b[:100])
		}
	})
	o := Options{Dir: t.TempDir(), Archive: url, pin: pinOf(b)}
	if _, err := Install(t.Context(), o); err == nil || !strings.Contains(err.Error(), "503") || !strings.Contains(err.Error(), "goes on") {
		t.Fatalf("Install = %v", err)
	}
	if _, err := Open(o.Dir); !errors.Is(err, ErrNone) {
		t.Errorf("Open = %v", err)
	}
	broken = false
	if _, err := Install(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, o.Dir)
	if want := ",bytes=100-,bytes=100-"; strings.Join(*asked, ",") != want {
		t.Errorf("asked for %q", *asked)
	}
}

// An install that fails leaves the one before as it was.
func TestFailureChangesNothing(t *testing.T) {
	b := archive(t, programs())
	url, _ := web(t, whole(b))
	o := Options{Dir: t.TempDir(), Archive: url, pin: pinOf(b)}
	if _, err := Install(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		serve http.HandlerFunc
		pin   pin
		want  string
		is    error
	}{
		"wrong sum": {whole(b), pin{version, strings.Repeat("ab", 32)}, "SHA-256", download.ErrSum},
		"truncated": {whole(b[:len(b)-1]), pin{version, strings.Repeat("cd", 32)}, "SHA-256", download.ErrSum},
		"gone":      {func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }, pin{version, strings.Repeat("ef", 32)}, "404", nil},
		"no gzip":   {whole([]byte("hello")), pinOf([]byte("hello")), "unpack", nil},
		"no jailer": func() (c struct {
			serve http.HandlerFunc
			pin   pin
			want  string
			is    error
		}) {
			other := archive(t, map[string]string{"firecracker": "x"})
			c.serve, c.pin, c.want = whole(other), pinOf(other), "it holds no release-v9.8.7-x86_64/jailer-v9.8.7-x86_64"
			return c
		}(),
	} {
		t.Run(name, func(t *testing.T) {
			o := o
			o.Archive, _ = web(t, c.serve)
			o.pin = c.pin
			_, err := Install(t.Context(), o)
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("Install = %v", err)
			}
			o.Archive, o.pin = url, pinOf(b)
			if _, err := Install(t.Context(), o); err != nil {
				t.Error(err)
			}
			checkInstalled(t, o.Dir)
		})
	}
	o.Archive, o.pin = "http://127.0.0.1:1/", pin{version, strings.Repeat("01", 32)}
	if _, err := Install(t.Context(), o); err == nil || !strings.Contains(err.Error(), "--release") {
		t.Errorf("Install without a network = %v", err)
	}
}

func TestServerWithoutRanges(t *testing.T) {
	b := archive(t, programs())
	first := true
	url, _ := web(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100000")
		if first {
			first = false
			_, _ = w.Write(b[:100])
			return
		}
		w.Header().Del("Content-Length")
		_, _ = w.Write(b)
	})
	dir := t.TempDir()
	if _, err := Install(t.Context(), Options{Dir: dir, Archive: url, pin: pinOf(b)}); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, dir)
}

func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	p := programs()
	p["firecracker"] += strings.Repeat("\x00", 1<<20) // small in the archive, too large to unpack
	b := archive(t, p)
	url, _ := web(t, whole(b))
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if _, err := Install(t.Context(), Options{Dir: dir, Archive: url, pin: pinOf(b)}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("Install = %v", err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrNone) {
		t.Errorf("Open = %v", err)
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	if _, err := Install(t.Context(), Options{Dir: dir, Archive: url, pin: pinOf(b)}); err != nil {
		t.Fatal(err)
	}
	clean(t, dir)
}

func TestArchiveFile(t *testing.T) {
	b := archive(t, programs())
	file := filepath.Join(t.TempDir(), "release.tgz")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := Install(t.Context(), Options{Dir: dir, Archive: file, pin: pinOf(b)}); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, dir)
	if _, err := os.Stat(file); err != nil {
		t.Errorf("the archive is gone: %v", err)
	}
	_, err := Install(t.Context(), Options{Dir: t.TempDir(), Archive: file})
	if err == nil || !strings.Contains(err.Error(), "is not the archive of Firecracker "+Version) {
		t.Errorf("Install = %v", err)
	}
}

func TestProgramOfOnesOwn(t *testing.T) {
	own := t.TempDir()
	for _, name := range []string{"firecracker-v1.15.0-x86_64", "jailer-v1.15.0-x86_64"} {
		if err := os.WriteFile(filepath.Join(own, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := filepath.Join(own, "firecracker-v1.15.0-x86_64")
	dir := t.TempDir()
	b := archive(t, programs())
	url, _ := web(t, whole(b))
	if _, err := Install(t.Context(), Options{Dir: dir, Archive: url, pin: pinOf(b)}); err != nil {
		t.Fatal(err)
	}
	i, err := Install(t.Context(), Options{Dir: dir, Program: p})
	if err != nil {
		t.Fatal(err)
	}
	if i.Firecracker != p || i.Jailer != filepath.Join(own, "jailer-v1.15.0-x86_64") || i.Version != "" {
		t.Errorf("got %+v", i)
	}
	if old, err := filepath.Glob(filepath.Join(dir, "v*")); err != nil || len(old) > 0 {
		t.Errorf("the release is still there: %v, %v", old, err)
	}
	// And back.
	if _, err := Install(t.Context(), Options{Dir: dir, Archive: url, pin: pinOf(b)}); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, dir)
	if err := os.Chmod(p, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Install(t.Context(), Options{Dir: dir, Program: p}); err == nil || !strings.Contains(err.Error(), "is not a program") {
		t.Errorf("Install = %v", err)
	}
	if _, err := Install(t.Context(), Options{Dir: dir, Program: p, Archive: url}); err == nil {
		t.Error("both a program and a release were taken")
	}
	if got := JailerOf(filepath.Join(own, "vmm")); got != "" {
		t.Errorf("the jailer of a program of another name is %s", got)
	}
}

// Of two at the same time one works.
func TestConcurrentInstalls(t *testing.T) {
	b := archive(t, programs())
	url, asked := web(t, whole(b))
	o := Options{Dir: t.TempDir(), Archive: url, pin: pinOf(b)}
	errs := make(chan error, 4)
	for range cap(errs) {
		go func() { _, err := Install(context.WithoutCancel(t.Context()), o); errs <- err }()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	checkInstalled(t, o.Dir)
	if len(*asked) != 1 {
		t.Errorf("the server was asked %d times", len(*asked))
	}
}

func FuzzArchive(f *testing.F) {
	f.Add(archive(f, programs()))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		_, err := readArchive(t.Context(), bytes.NewReader(b), dir, version)
		if err != nil {
			return
		}
		if _, err := os.Stat(filepath.Join(dir, "jailer")); err != nil {
			t.Error(err)
		}
	})
}
