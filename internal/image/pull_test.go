package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func TestPull(t *testing.T) {
	var asked atomic.Int64
	r := serve(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			asked.Add(1)
			h.ServeHTTP(w, q)
		})
	})
	one, two := simple(t, "one"), simple(t, "two")
	ref := push(t, r, "team/app:v1", one)
	s := newStore(t)
	ctx := context.Background()

	if _, err := s.Pull(ctx, ref, PullOptions{Policy: PullNever}); !errors.Is(err, ErrUnknown) {
		t.Errorf("never: %v", err)
	}
	img, err := s.Pull(ctx, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if img.ID != digest(t, one) || len(img.Refs) != 1 || img.Refs[0] != ref {
		t.Errorf("image is %s %v, want %s %s", img.ID, img.Refs, digest(t, one), ref)
	}
	if fi, err := os.Stat(img.RootFS); err != nil || fi.Size() != img.Size {
		t.Errorf("file system: %v %v, image says %d bytes", fi, err, img.Size)
	}
	if d := cmp.Diff([]string{"/app"}, img.Config.Config.Cmd); d != "" {
		t.Error(d)
	}
	want := map[string]string{"app": "one", "etc/name": "one"}
	if d := cmp.Diff(want, content(t, img)); d != "" {
		t.Errorf("content (-want +got):\n%s", d)
	}

	// The tag moves, which only "always" sees.
	push(t, r, "team/app:v1", two)
	before := asked.Load()
	for _, p := range []Policy{PullMissing, PullNever} {
		if again, err := s.Pull(ctx, ref, PullOptions{Policy: p}); err != nil || again.ID != img.ID {
			t.Errorf("%s: %v %v", p, again, err)
		}
	}
	if n := asked.Load() - before; n != 0 {
		t.Errorf("the registry was asked %d times", n)
	}
	moved, err := s.Pull(ctx, ref, PullOptions{Policy: PullAlways})
	if err != nil {
		t.Fatal(err)
	}
	if moved.ID != digest(t, two) || moved.Refs[0] != ref {
		t.Errorf("always: %s %v", moved.ID, moved.Refs)
	}
	old, err := s.Get(img.ID)
	if err != nil || len(old.Refs) != 0 {
		t.Errorf("the old image: %v %v", old, err)
	}

	// By digest it is the same image, under one more name.
	byDigest := r.Addr() + "/team/app@" + digest(t, two)
	img, err = s.Pull(ctx, byDigest, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{ref, byDigest}, img.Refs); d != "" {
		t.Error(d)
	}
	all, err := s.List()
	if err != nil || len(all) != 2 || all[0].ID != moved.ID {
		t.Errorf("List: %v %v", all, err)
	}
	if _, err := s.Pull(ctx, ref, PullOptions{Policy: "often"}); err == nil {
		t.Error("an unknown policy is accepted")
	}
}

// indexOf makes an index of images by their platforms; "" gives none.
func indexOf(t testing.TB, byPlatform map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for p, img := range byPlatform {
		d := v1.Descriptor{}
		if p != "" {
			os, arch, _ := strings.Cut(p, "/")
			d.Platform = &v1.Platform{OS: os, Architecture: arch}
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: d})
	}
	return idx
}

func TestPlatforms(t *testing.T) {
	r := serve(t, nil)
	amd, arm := simple(t, "amd"), imageOf(t, "linux/arm64", tarOf(t, map[string]string{"app": "arm"}))
	attest := imageOf(t, "unknown/unknown", tarOf(t, map[string]string{"a": "b"}))
	pushIndex := func(ref string, idx v1.ImageIndex) {
		n, err := name.ParseReference(r.Addr() + "/" + ref)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.WriteIndex(n, idx); err != nil {
			t.Fatal(err)
		}
	}
	pushIndex("both:1", indexOf(t, map[string]v1.Image{"linux/arm64": arm, "linux/amd64": amd, "unknown/unknown": attest}))
	pushIndex("other:1", indexOf(t, map[string]v1.Image{"linux/arm64": arm, "unknown/unknown": attest}))
	pushIndex("unnamed:1", indexOf(t, map[string]v1.Image{"": amd}))
	push(t, r, "single:1", arm)
	s := newStore(t)
	ctx := context.Background()
	for _, ref := range []string{"both:1", "unnamed:1"} {
		img, err := s.Pull(ctx, r.Addr()+"/"+ref, PullOptions{})
		if err != nil || img.ID != digest(t, amd) {
			t.Errorf("%s: %v %v", ref, img, err)
		}
	}
	for ref, want := range map[string]string{"other:1": "only for linux/arm64", "single:1": "it is for linux/arm64"} {
		_, err := s.Pull(ctx, r.Addr()+"/"+ref, PullOptions{})
		if !errors.Is(err, ErrNoPlatform) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if img, err := s.Pull(ctx, r.Addr()+"/both:1", PullOptions{Policy: PullAlways, Platform: "linux/arm64"}); err != nil || img.ID != digest(t, arm) {
		t.Errorf("linux/arm64: %v %v", img, err)
	}
	if _, err := s.Pull(ctx, r.Addr()+"/both:1", PullOptions{Platform: "x86"}); err == nil {
		t.Error("a malformed platform is accepted")
	}
}

// blobs answers downloads of layers itself. answer returns false to let the
// registry do so.
func blobFault(answer func(w http.ResponseWriter, q *http.Request, h http.Handler) bool) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") && answer(w, q, h) {
				return
			}
			h.ServeHTTP(w, q)
		})
	}
}

// recorder keeps an answer.
type recorder struct {
	head http.Header
	body bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.head }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
func (r *recorder) WriteHeader(int)             {}

func answerOf(q *http.Request, h http.Handler) []byte {
	r := &recorder{head: http.Header{}}
	h.ServeHTTP(r, q)
	return r.body.Bytes()
}

func TestPullFailures(t *testing.T) {
	noise := make([]byte, 200<<10)
	for i := range noise {
		noise[i] = byte(i * i >> 3 * (i >> 7))
	}
	img := imageOf(t, "linux/amd64", tarOf(t, map[string]string{"small": "x"}), tarOf(t, map[string]string{"big": string(noise)}))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	big := digest(t, layers[1])
	isBig := func(q *http.Request) bool { return strings.HasSuffix(q.URL.Path, big) }
	status := func(code int) func(http.Handler) http.Handler {
		return func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/manifests/") {
					w.WriteHeader(code)
					return
				}
				h.ServeHTTP(w, q)
			})
		}
	}
	for name, c := range map[string]struct {
		wrap func(http.Handler) http.Handler
		ref  string
		is   error
		want string
	}{
		"unknown tag":        {nil, "app:v9", ErrUnknown, "MANIFEST_UNKNOWN"},
		"unknown repository": {nil, "nothing:v1", ErrUnknown, "NAME_UNKNOWN"},
		"unknown digest":     {nil, "app@sha256:" + strings.Repeat("0", 64), ErrUnknown, "MANIFEST_UNKNOWN"},
		"refused":            {status(http.StatusForbidden), "app:v1", ErrUnauthorized, "login"},
		"too often":          {status(http.StatusTooManyRequests), "app:v1", ErrRegistry, "wait"},
		"broken":             {status(http.StatusInternalServerError), "app:v1", ErrRegistry, "500"},
		"not a manifest": {func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/manifests/") {
					fmt.Fprint(w, "<html>log in to the hotel's network</html>")
					return
				}
				h.ServeHTTP(w, q)
			})
		}, "app:v1", ErrCorrupt, "manifest"},
		"wrong manifest": {func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/manifests/") {
					_, _ = w.Write(append(answerOf(q, h), ' '))
					return
				}
				h.ServeHTTP(w, q)
			})
		}, "app@" + digest(t, img), ErrCorrupt, "wrong digest"},
		"layer missing": {blobFault(func(w http.ResponseWriter, q *http.Request, _ http.Handler) bool {
			if isBig(q) {
				w.WriteHeader(http.StatusNotFound)
			}
			return isBig(q)
		}), "app:v1", ErrUnknown, "layer 2 of 2, " + big},
		"layer dies half way": {blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
			if !isBig(q) {
				return false
			}
			b := answerOf(q, h)
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:len(b)/2])
			panic(http.ErrAbortHandler)
		}), "app:v1", ErrRegistry, "layer 2 of 2, " + big},
		"layer is cut short": {blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
			if isBig(q) {
				b := answerOf(q, h)
				_, _ = w.Write(b[:len(b)/2])
			}
			return isBig(q)
		}), "app:v1", ErrRegistry, "layer 2 of 2, " + big},
		"layer has other bytes": {blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
			if isBig(q) {
				b := answerOf(q, h)
				b[len(b)/2] ^= 1
				_, _ = w.Write(b)
			}
			return isBig(q)
		}), "app:v1", ErrCorrupt, "layer 2 of 2, " + big + ": image is corrupt: wrong digest"},
		"layer has more bytes": {blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
			if isBig(q) {
				_, _ = w.Write(append(answerOf(q, h), "more"...))
			}
			return isBig(q)
		}), "app:v1", ErrCorrupt, "layer 2 of 2, " + big + ": image is corrupt: wrong digest"},
		"layer stalls": {blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
			if isBig(q) {
				b := answerOf(q, h)
				_, _ = w.Write(b[:len(b)/2])
				_ = http.NewResponseController(w).Flush()
				<-q.Context().Done()
			}
			return isBig(q)
		}), "app:v1", ErrRegistry, "sent nothing"},
		"other configuration": {blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
			b := answerOf(q, h)
			if bytes.HasPrefix(b, []byte("{")) {
				_, _ = w.Write(bytes.Replace(b, []byte("/app"), []byte("/hck"), 1))
			}
			return bytes.HasPrefix(b, []byte("{"))
		}), "app:v1", ErrCorrupt, "wrong digest"},
	} {
		t.Run(name, func(t *testing.T) {
			var on atomic.Bool // the push gets through
			r := serve(t, func(h http.Handler) http.Handler {
				broken := h
				if c.wrap != nil {
					broken = c.wrap(h)
				}
				return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
					if on.Load() {
						broken.ServeHTTP(w, q)
						return
					}
					h.ServeHTTP(w, q)
				})
			})
			push(t, r, "app:v1", img)
			on.Store(true)
			s := newStore(t)
			if name == "layer stalls" {
				s.stall = 50 * time.Millisecond
			}
			_, err := s.Pull(context.Background(), r.Addr()+"/"+c.ref, PullOptions{})
			if !errors.Is(err, c.is) || !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("error is %v\nwant %q with %q", err, c.is, c.want)
			}
			nothingLeft(t, s)
		})
	}
}

func TestRegistryDown(t *testing.T) {
	r := serve(t, nil)
	addr := r.Addr()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	_, err := s.Pull(context.Background(), addr+"/app", PullOptions{})
	if !errors.Is(err, ErrRegistry) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("error is %v", err)
	}
	nothingLeft(t, s)
}

// Images whose digests are right and which are wrong all the same.
func TestBadImages(t *testing.T) {
	good := tarOf(t, map[string]string{"a": "1"})
	for name, c := range map[string]struct {
		img  v1.Image
		want string
	}{
		"layer leaves the root": {imageOf(t, "linux/amd64", tarOf(t, map[string]string{"../../etc/passwd": "x"})), "leaves the root"},
		"layer is no archive":   {imageOf(t, "linux/amd64", good, bytes.Repeat([]byte("text"), 1000)), "layer 2 of 2"},
		"layer is cut":          {imageOf(t, "linux/amd64", tarOf(t, map[string]string{"a": strings.Repeat("1", 3000)})[:1000]), "layer 1 of 1"},
		"other content":         {withDiffID(t, imageOf(t, "linux/amd64", good)), "its content is sha256:"},
		"too few layers":        {withoutDiffIDs(t, imageOf(t, "linux/amd64", good)), "not a container image"},
	} {
		t.Run(name, func(t *testing.T) {
			r := serve(t, nil)
			ref := push(t, r, "bad:1", c.img)
			s := newStore(t)
			_, err := s.Pull(context.Background(), ref, PullOptions{})
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
			nothingLeft(t, s)
		})
	}
}

func withDiffID(t testing.TB, img v1.Image) v1.Image {
	return editConfig(t, img, func(c *v1.ConfigFile) { c.RootFS.DiffIDs[0].Hex = strings.Repeat("0", 64) })
}

func withoutDiffIDs(t testing.TB, img v1.Image) v1.Image {
	return editConfig(t, img, func(c *v1.ConfigFile) { c.RootFS.DiffIDs = nil })
}

func editConfig(t testing.TB, img v1.Image, edit func(*v1.ConfigFile)) v1.Image {
	t.Helper()
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	edit(cf)
	out, err := mutate.ConfigFile(img, cf)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var on atomic.Bool
	r := serve(t, blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
		b := answerOf(q, h)
		if !on.Load() || bytes.HasPrefix(b, []byte("{")) {
			return false
		}
		_, _ = w.Write(b[:len(b)/2])
		_ = http.NewResponseController(w).Flush()
		cancel()
		<-q.Context().Done()
		return true
	}))
	ref := push(t, r, "app:v1", simple(t, "x"))
	on.Store(true)
	s := newStore(t)
	if _, err := s.Pull(ctx, ref, PullOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
	nothingLeft(t, s)
}

func TestProgress(t *testing.T) {
	r := serve(t, nil)
	img := simple(t, "x")
	ref := push(t, r, "app:v1", img)
	var inside, calls atomic.Int64
	done := map[Stage]map[string]int64{}
	var order []Stage
	got, err := newStore(t).Pull(context.Background(), ref, PullOptions{Progress: func(p Progress) {
		if inside.Add(1) != 1 {
			t.Error("calls overlap")
		}
		defer inside.Add(-1)
		calls.Add(1)
		if done[p.Stage] == nil {
			done[p.Stage] = map[string]int64{}
			order = append(order, p.Stage)
		}
		if p.Done < done[p.Stage][p.Layer] || p.Done > p.Total {
			t.Errorf("%+v after %d", p, done[p.Stage][p.Layer])
		}
		done[p.Stage][p.Layer] = p.Done
	}})
	if err != nil {
		t.Fatal(err)
	}
	n := calls.Load()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		size, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range []Stage{StageDownload, StageMerge} {
			if done[st][digest(t, l)] != size {
				t.Errorf("%s of %s ended at %d of %d", st, digest(t, l), done[st][digest(t, l)], size)
			}
		}
	}
	if order[0] != StageResolve || order[len(order)-1] != StageDone || done[StageDone][""] != got.Size {
		t.Errorf("stages %v, done %v", order, done[StageDone])
	}
	if calls.Load() != n {
		t.Error("a call came after Pull returned")
	}
}
