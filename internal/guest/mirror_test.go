package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	neturl "net/url"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
)

// mirror is a Debian mirror with one kernel; edit changes a file before it is
// served.
func mirror(t *testing.T, edit func(path string, content []byte) []byte) string {
	t.Helper()
	pkg := deb(t, ".xz", kernelFiles())
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	const file = "pool/main/l/linux/linux-image-" + release + "_6.1.9_amd64.deb"
	index := fmt.Sprintf("Package: linux-image-%s\nVersion: 6.1.9\nFilename: %s\nSize: %d\nSHA256: %s\nDescription: kernel\n with more lines\n\n"+
		"Package: other\nFilename: x\n\nPackage: linux-image-cloud-amd64\nDepends: linux-image-%s (= 6.1.9)\n", release, file, len(pkg), sum(pkg), release)
	var packed bytes.Buffer
	x, err := xz.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(x, index); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{
		"/dists/bookworm/" + packagesFile: packed.Bytes(),
		"/" + file:                        pkg,
		"/dists/bookworm/Release": []byte("Suite: oldstable\nMD5Sum:\n 00 1 " + packagesFile + "\nSHA256:\n " +
			sum(packed.Bytes()) + " 1 " + packagesFile + "\n"),
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, ok := files[r.URL.Path]
		if b = bytes.Clone(b); ok && edit != nil {
			b = edit(r.URL.Path, b)
		}
		if b == nil {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(b) // the client may hang up
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestSetupFromMirror(t *testing.T) {
	var last int64
	a, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), Mirror: mirror(t, nil), InitBinary: initBinary(t, "1"),
		Progress: func(stage string, done, total int64) {
			if strings.HasPrefix(stage, "download linux-image") && total > 0 {
				last = total - done
			}
		}})
	if err != nil {
		t.Fatal(err)
	}
	if a.KernelVersion != release || last != 0 {
		t.Errorf("got %+v, %d bytes missing", a, last)
	}
}

func TestSetupFromBadMirror(t *testing.T) {
	change := func(suffix string, f func([]byte) []byte) func(string, []byte) []byte {
		return func(path string, b []byte) []byte {
			if strings.HasSuffix(path, suffix) {
				return f(b)
			}
			return b
		}
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	for name, c := range map[string]struct {
		edit func(string, []byte) []byte
		want string
	}{
		"no such suite":  {change("Release", func([]byte) []byte { return nil }), "404"},
		"index changed":  {change("Packages.xz", flip), "SHA-256"},
		"no index":       {change("Release", func([]byte) []byte { return []byte("SHA256:\n") }), "does not list"},
		"package gone":   {change(".deb", func([]byte) []byte { return nil }), "404"},
		"package short":  {change(".deb", func(b []byte) []byte { return b[:len(b)-1] }), "bytes of it, not"},
		"package longer": {change(".deb", func(b []byte) []byte { return append(b, 0) }), "more than"},
		"package edited": {change(".deb", flip), "SHA-256"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), Mirror: mirror(t, c.edit), InitBinary: initBinary(t, "1")})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Setup = %v, want %q in it", err, c.want)
			}
		})
	}
	_, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), Mirror: "http://127.0.0.1:1", InitBinary: initBinary(t, "1")})
	if err == nil || !strings.Contains(err.Error(), "--kernel-deb") {
		t.Errorf("Setup without a network = %v, want what to do", err)
	}
}

// A setup that was interrupted goes on with what it had downloaded.
func TestSetupResumesDownload(t *testing.T) {
	dir, broken := t.TempDir(), true
	var asked string
	url := mirror(t, nil)
	target, err := neturl.Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".deb") {
			if asked = r.Header.Get("Range"); broken {
				if asked != "" {
					w.WriteHeader(http.StatusBadGateway)
					return
				}
				resp, err := http.Get(url + r.URL.Path)
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
				_, _ = io.CopyN(w, resp.Body, 100) // the rest never comes
				return
			}
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	o := SetupOptions{Dir: dir, Mirror: s.URL, InitBinary: initBinary(t, "1")}
	if _, err := Setup(t.Context(), o); err == nil || !strings.Contains(err.Error(), "100 of ") {
		t.Fatalf("Setup = %v", err)
	}
	broken = false
	if _, err := Setup(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if asked != "bytes=100-" {
		t.Errorf("the second setup asked for %q", asked)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func FuzzStanzas(f *testing.F) {
	f.Add([]byte("Package: a\nDepends: b (= 1) | c, d:any\n more\n\nPackage: e\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		all, err := parseStanzas(bytes.NewReader(in), func(string) bool { return true })
		if err != nil {
			return
		}
		for _, s := range all {
			dependencies(s["Depends"])
		}
		_, _ = releaseSum(in, packagesFile) // must not panic
	})
}
