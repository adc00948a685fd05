package download

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const size = 1 << 20

func content(seed int64) []byte {
	b := make([]byte, size)
	rand.New(rand.NewSource(seed)).Read(b)
	return b
}

func sum(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

// server answers the requests one after the other, and the last one's way for ever.
type server struct {
	*httptest.Server
	ranges []string // that were asked for
}

func serve(t *testing.T, answers ...http.HandlerFunc) *server {
	t.Helper()
	s := &server{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i := min(len(s.ranges), len(answers)-1)
		s.ranges = append(s.ranges, r.Header.Get("Range"))
		answers[i](w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// whole serves b, and ranges of it.
func whole(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "file.tgz", time.Time{}, bytes.NewReader(b))
	}
}

// broken serves n bytes of what h would, and breaks the connection.
func broken(h http.HandlerFunc, n int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h(&cut{ResponseWriter: w, left: n}, r)
	}
}

type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p[:min(len(p), c.left)])
	if c.left -= n; c.left == 0 {
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// plain serves b, and knows no ranges.
func plain(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func file(t *testing.T, url string, want []byte) File {
	t.Helper()
	return File{URL: url, Path: filepath.Join(t.TempDir(), "file.tgz"), SHA256: sum(want), Limit: 2 * size}
}

func check(t *testing.T, f File, want []byte) {
	t.Helper()
	got, err := os.ReadFile(f.Path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file has %d bytes, %v; want %d", len(got), err, len(want))
	}
	if _, err := os.Stat(f.Path + PartSuffix); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the part is still there: %v", err)
	}
}

func (s *server) asked(t *testing.T, want ...string) {
	t.Helper()
	if strings.Join(s.ranges, ",") != strings.Join(want, ",") {
		t.Errorf("asked for %q, want %q", s.ranges, want)
	}
}

func TestFetch(t *testing.T) {
	want := content(1)
	s := serve(t, whole(want))
	f := file(t, s.URL, want)
	var done, total int64
	f.Progress = func(d, n int64) {
		if d < done {
			t.Errorf("progress went from %d to %d", done, d)
		}
		done, total = d, n
	}
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	if done != size || total != size {
		t.Errorf("progress ended at %d of %d", done, total)
	}
	s.asked(t, "")
}

// A connection that breaks is made anew within one call.
func TestConnectionBreaks(t *testing.T) {
	want := content(1)
	s := serve(t, broken(whole(want), 300_000), broken(whole(want), 100_000), whole(want))
	f := file(t, s.URL, want)
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	s.asked(t, "", "bytes=300000-", "bytes=400000-")
}

// What came is kept over an error, and over the end of the program.
func TestInterruptedAndResumed(t *testing.T) {
	want := content(1)
	s := serve(t, broken(whole(want), 300_000), status(http.StatusBadGateway), whole(want))
	f := file(t, s.URL, want)
	err := Fetch(t.Context(), f)
	if err == nil || !strings.Contains(err.Error(), "502 Bad Gateway") || !strings.Contains(err.Error(), "300000 of 1048576 bytes are there") {
		t.Fatalf("Fetch = %v", err)
	}
	if _, err := os.Stat(f.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a file is there: %v", err)
	}
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	s.asked(t, "", "bytes=300000-", "bytes=300000-")
}

func TestCanceledAndResumed(t *testing.T) {
	want := content(1)
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = w.Write(want[:1000])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}, whole(want))
	f := file(t, s.URL, want)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	f.Progress = func(done, _ int64) {
		if done == 1000 {
			cancel(stop)
		}
	}
	if err := Fetch(ctx, f); !errors.Is(err, stop) {
		t.Fatalf("Fetch = %v", err)
	}
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	s.asked(t, "", "bytes=1000-")
}

func TestServerWithoutRanges(t *testing.T) {
	want := content(1)
	s := serve(t, broken(plain(want), 300_000), plain(want))
	f := file(t, s.URL, want)
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
}

func TestWrongSum(t *testing.T) {
	want := content(1)
	s := serve(t, whole(content(2)), whole(want))
	f := file(t, s.URL, want)
	err := Fetch(t.Context(), f)
	if !errors.Is(err, ErrSum) || !strings.Contains(err.Error(), sum(want)) || !strings.Contains(err.Error(), sum(content(2))) {
		t.Fatalf("Fetch = %v", err)
	}
	if _, err := os.Stat(f.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a wrong file is there: %v", err)
	}
	// Nothing of it is left to go on from.
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	s.asked(t, "", "")
}

// The file was exchanged on the server while half of it was here.
func TestFileChanges(t *testing.T) {
	want := content(1)
	s := serve(t, broken(whole(content(2)), 300_000), whole(want))
	f := file(t, s.URL, want)
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	s.asked(t, "", "bytes=300000-", "")
}

func TestTruncatedOnTheServer(t *testing.T) {
	want := content(1)
	f := file(t, serve(t, whole(want[:size/2])).URL, want)
	if err := Fetch(t.Context(), f); !errors.Is(err, ErrSum) {
		t.Errorf("Fetch = %v", err)
	}
	f.Size = size
	if err := Fetch(t.Context(), f); err == nil || !strings.Contains(err.Error(), "has 524288 bytes of it, not 1048576") {
		t.Errorf("Fetch = %v", err)
	}
}

// A part that is longer than the file on the server is of another file.
func TestPartTooLong(t *testing.T) {
	want := content(1)
	s := serve(t, whole(want))
	f := file(t, s.URL, want)
	if err := os.WriteFile(f.Path+PartSuffix, make([]byte, size+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Fetch(t.Context(), f); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Fatalf("Fetch = %v", err)
	}
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
}

// All of it came, and then the program ended.
func TestPartComplete(t *testing.T) {
	want := content(1)
	s := serve(t, status(http.StatusInternalServerError))
	f := file(t, s.URL, want)
	if err := os.WriteFile(f.Path+PartSuffix, want, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
	s.asked(t)
}

func TestTooLong(t *testing.T) {
	want := content(1)
	for name, h := range map[string]http.HandlerFunc{
		"said": whole(want),
		"not said": func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).Flush() // so there is no Content-Length
			_, _ = w.Write(want)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := file(t, serve(t, h).URL, want)
			f.Limit = size - 1
			if err := Fetch(t.Context(), f); err == nil || !strings.Contains(err.Error(), "1048575") {
				t.Errorf("Fetch = %v", err)
			}
		})
	}
}

func TestOddRange(t *testing.T) {
	want := content(1)
	for _, header := range []string{"bytes 0-9/1048576", "bytes x", "", "bytes 5-9/3"} {
		s := serve(t, broken(whole(want), 5), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", header)
			w.WriteHeader(http.StatusPartialContent)
		})
		if err := Fetch(t.Context(), file(t, s.URL, want)); err == nil || !strings.Contains(err.Error(), "the server sends") {
			t.Errorf("with %q: Fetch = %v", header, err)
		}
	}
}

func TestServerSendsNothing(t *testing.T) {
	want := content(1)
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	f := file(t, s.URL, want)
	f.Idle = 10 * time.Millisecond
	if err := Fetch(t.Context(), f); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "sent nothing for 10ms") {
		t.Errorf("Fetch = %v", err)
	}
}

func TestNoServer(t *testing.T) {
	s := httptest.NewServer(nil)
	s.Close()
	if err := Fetch(t.Context(), file(t, s.URL, nil)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Fetch = %v", err)
	}
	if _, err := Get(t.Context(), s.URL, 1); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Get = %v", err)
	}
}

func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	want := content(1)
	f := file(t, serve(t, whole(want)).URL, want)
	dir := filepath.Dir(f.Path)
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	err := Fetch(t.Context(), f)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "make room") {
		t.Fatalf("Fetch = %v", err)
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	if err := Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	check(t, f, want)
}

func TestGet(t *testing.T) {
	s := serve(t, plain([]byte("hello")), status(http.StatusNotFound), plain([]byte("hello")))
	if b, err := Get(t.Context(), s.URL, 5); err != nil || string(b) != "hello" {
		t.Errorf("Get = %q, %v", b, err)
	}
	if _, err := Get(t.Context(), s.URL, 5); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("Get = %v", err)
	}
	if _, err := Get(t.Context(), s.URL, 4); err == nil || !strings.Contains(err.Error(), "over 4 bytes") {
		t.Errorf("Get = %v", err)
	}
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 100-199/200")
	f.Add("bytes 1-2/*")
	f.Fuzz(func(t *testing.T, s string) {
		from, total, err := contentRange(s)
		if err == nil && (from < 0 || total < 0) {
			t.Errorf("%q gives %d, %d", s, from, total)
		}
	})
}
