package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"fcvm/test/images"
)

// stored brings img into the store under names.
func stored(t testing.TB, s *Store, img v1.Image, names ...string) *Image {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	if err := images.WriteOCI(dir, img, "latest"); err != nil {
		t.Fatal(err)
	}
	platform, err := PullOptions{}.platform()
	if err != nil {
		t.Fatal(err)
	}
	all, err := ociLayout{dir}.images(ctx, reference{prefix: layoutPrefix, path: dir}, platform)
	if err != nil {
		t.Fatal(err)
	}
	full := []string{}
	for _, n := range names {
		r, err := parseReference(n)
		if err != nil {
			t.Fatal(err)
		}
		full = append(full, r.String())
	}
	out, err := s.add(ctx, all[0].source, full, &reporter{})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestReferences(t *testing.T) {
	dir := t.TempDir()
	sum := "sha256:" + strings.Repeat("ab", 32)
	for in, want := range map[string]struct{ full, short string }{
		"nginx":                     {"docker.io/library/nginx:latest", "nginx:latest"},
		"nginx:1.27":                {"docker.io/library/nginx:1.27", "nginx:1.27"},
		"docker.io/nginx":           {"docker.io/library/nginx:latest", "nginx:latest"},
		"index.docker.io/me/app":    {"docker.io/me/app:latest", "me/app:latest"},
		"docker://me/app":           {"docker.io/me/app:latest", "me/app:latest"},
		"nginx@" + sum:              {"docker.io/library/nginx@" + sum, "nginx@" + sum},
		"nginx:1.27@" + sum:         {"docker.io/library/nginx@" + sum, "nginx@" + sum},
		"localhost:5000/a/b":        {"localhost:5000/a/b:latest", "localhost:5000/a/b:latest"},
		"[::1]:5000/a:1":            {"[::1]:5000/a:1", "[::1]:5000/a:1"},
		"quay.io/a/b/c:x":           {"quay.io/a/b/c:x", "quay.io/a/b/c:x"},
		"oci:" + dir:                {"oci:" + dir, "oci:" + dir},
		"oci:" + dir + ":tag":       {"oci:" + dir + ":tag", "oci:" + dir + ":tag"},
		"oci-archive:/x/a.tar:t":    {"oci-archive:/x/a.tar:t", "oci-archive:/x/a.tar:t"},
		"docker-archive:/x/a:me:v1": {"docker-archive:/x/a:me:v1", "docker-archive:/x/a:me:v1"},
		"docker-archive:/x/a.tar":   {"docker-archive:/x/a.tar", "docker-archive:/x/a.tar"},
	} {
		r, err := parseReference(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		if got := r.String(); got != want.full || shortName(got) != want.short {
			t.Errorf("%s is %q, in short %q", in, got, shortName(got))
		}
		// A short name leads to where the full one does.
		if again, err := parseReference(want.short); err != nil || again.String() != want.full {
			t.Errorf("%s is %v %v", want.short, again, err)
		}
	}
	for _, in := range []string{"", "UPPER", "a b", "nginx:", "nginx@sha256:12", "a//b", ":tag", "oci:", "oci::tag", "../x", "nginx:" + strings.Repeat("t", 129)} {
		if r, err := parseReference(in); !errors.Is(err, ErrReference) {
			t.Errorf("%q is accepted as %v (%v)", in, r, err)
		}
	}
}

func TestGet(t *testing.T) {
	s := newStore(t)
	a := stored(t, s, simple(t, "a"), "app:a", "app")
	b := stored(t, s, simple(t, "b"), "app:b")
	hexOf := func(i *Image) string { return strings.TrimPrefix(i.ID, "sha256:") }
	for in, want := range map[string]string{
		"app": a.ID, "app:latest": a.ID, "docker.io/library/app:a": a.ID, "app:b": b.ID,
		a.ID: a.ID, hexOf(a): a.ID, hexOf(a)[:12]: a.ID, hexOf(b)[:8]: b.ID, b.ID[:20]: b.ID,
	} {
		got, err := s.Get(in)
		if err != nil || got.ID != want {
			t.Errorf("Get(%s): %v %v", in, got, err)
		}
	}
	for _, in := range []string{"app:c", "other", hexOf(a)[:3], "0000", strings.Repeat("0", 64), "sha256:" + strings.Repeat("0", 64)} {
		if got, err := s.Get(in); !errors.Is(err, ErrUnknown) {
			t.Errorf("Get(%s): %v %v", in, got, err)
		}
	}
	if _, err := s.Get("No Name"); !errors.Is(err, ErrReference) {
		t.Errorf("Get of a malformed name: %v", err)
	}
	// A name wins over an ID that starts alike.
	c := stored(t, s, simple(t, "c"), hexOf(a)[:6])
	if got, err := s.Get(hexOf(a)[:6]); err != nil || got.ID != c.ID {
		t.Errorf("name like an ID: %v %v", got, err)
	}
}

func TestAmbiguousID(t *testing.T) {
	s := newStore(t)
	for _, x := range []string{"1", "2"} {
		if err := os.MkdirAll(s.path("sha256-abcdef"+strings.Repeat(x, 58)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Get("abcd"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("error is %v", err)
	}
}

func TestRemove(t *testing.T) {
	s := newStore(t)
	ctx := context.Background()
	img := stored(t, s, simple(t, "a"), "app:1", "app:2", "other")
	for _, step := range []struct {
		arg  string
		want Removed
	}{
		{"app:1", Removed{Untagged: []string{"app:1"}}},
		{"other", Removed{Untagged: []string{"other:latest"}}},
		{"app:2", Removed{Untagged: []string{"app:2"}, Deleted: img.ID}},
	} {
		got, err := s.Remove(ctx, step.arg)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(step.want, got); d != "" {
			t.Errorf("Remove(%s): %s", step.arg, d)
		}
	}
	nothingLeft(t, s)
	if _, err := s.Remove(ctx, "app:2"); !errors.Is(err, ErrUnknown) {
		t.Errorf("again: %v", err)
	}
	// By ID all names go.
	img = stored(t, s, simple(t, "a"), "app:1", "app:2")
	got, err := s.Remove(ctx, img.ID[7:19])
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Removed{Untagged: []string{"app:1", "app:2"}, Deleted: img.ID}, got); d != "" {
		t.Error(d)
	}
	nothingLeft(t, s)
}

func TestLease(t *testing.T) {
	s := newStore(t)
	ctx := context.Background()
	img := stored(t, s, simple(t, "a"), "app:1", "app:2")
	lease, err := s.Lease(img.ID)
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Lease(img.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(ctx, img.ID); !errors.Is(err, ErrInUse) {
		t.Errorf("by ID: %v", err)
	}
	if got, err := s.Get(img.ID); err != nil || len(got.Refs) != 2 {
		t.Errorf("a refused removal took names: %v %v", got, err)
	}
	// A name that is not the last may go.
	if _, err := s.Remove(ctx, "app:1"); err != nil {
		t.Error(err)
	}
	if _, err := s.Remove(ctx, "app:2"); !errors.Is(err, ErrInUse) {
		t.Errorf("the last name: %v", err)
	}

	// A child that inherited the lease keeps it.
	child := exec.Command("sleep", "600")
	child.ExtraFiles = []*os.File{lease}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(ctx, "app:2"); !errors.Is(err, ErrInUse) {
		t.Errorf("with the lease in a child: %v", err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed
	if _, err := s.Remove(ctx, "app:2"); err != nil {
		t.Errorf("after the child's death: %v", err)
	}
	nothingLeft(t, s)
	if _, err := s.Lease(img.ID); !errors.Is(err, ErrUnknown) {
		t.Errorf("Lease of a removed image: %v", err)
	}
	if _, err := s.Lease("../../etc"); !errors.Is(err, ErrReference) {
		t.Errorf("Lease of no ID: %v", err)
	}
}

// Damage is told, does not hide other images, and a pull or a removal mends it.
func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func(s *Store, img *Image) error{
		"file system cut": func(_ *Store, img *Image) error {
			_ = os.Chmod(img.RootFS, 0o600)
			return os.Truncate(img.RootFS, 4096)
		},
		"file system missing": func(_ *Store, img *Image) error { return os.Remove(img.RootFS) },
		"manifest is nonsense": func(s *Store, img *Image) error {
			return os.WriteFile(s.path(dirName(img.ID), manifestFile), []byte("{"), 0o600)
		},
		"manifest of another": func(s *Store, img *Image) error {
			return os.WriteFile(s.path(dirName(img.ID), manifestFile), []byte(`{"version":1,"id":"sha256:00","config":"e30="}`), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ok, img := stored(t, s, simple(t, "ok"), "ok"), stored(t, s, simple(t, "a"), "app")
			if err := damage(s, img); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Get("app"); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "fcvm image rm") {
				t.Errorf("Get: %v", err)
			}
			all, err := s.List()
			if !errors.Is(err, ErrCorrupt) || len(all) != 1 || all[0].ID != ok.ID {
				t.Errorf("List: %v %v", all, err)
			}
			again := stored(t, s, simple(t, "a"), "app")
			if d := cmp.Diff(map[string]string{"app": "a", "etc/name": "a"}, content(t, again)); d != "" {
				t.Errorf("pulled again: %s", d)
			}
			if err := damage(s, again); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Remove(context.Background(), "app"); err != nil {
				t.Errorf("Remove: %v", err)
			}
			if _, err := s.Remove(context.Background(), "ok"); err != nil {
				t.Errorf("Remove: %v", err)
			}
			nothingLeft(t, s)
		})
	}
}

func TestBadRefs(t *testing.T) {
	for in, want := range map[string]string{
		"{":                                    "remove",
		`{"version":2}`:                        "version 2",
		`{"version":1,"refs":{"a":"../../x"}}`: "remove",
	} {
		s := newStore(t)
		if err := os.WriteFile(s.path(refsFile), []byte(in), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get("app"); err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

func TestOpenFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(file, "images")); err == nil {
		t.Error("a store below a file opens")
	}
}

func TestResolveCommand(t *testing.T) {
	type in struct {
		imgEntry, imgCmd, entry []string
		clear                   bool
		cmd                     []string
	}
	e, c := []string{"/entry", "-e"}, []string{"cmd", "-c"}
	for name, x := range map[string]struct {
		in   in
		want []string
	}{
		"image's both":            {in{imgEntry: e, imgCmd: c}, []string{"/entry", "-e", "cmd", "-c"}},
		"image's entrypoint":      {in{imgEntry: e}, e},
		"image's command":         {in{imgCmd: c}, c},
		"own command":             {in{imgEntry: e, imgCmd: c, cmd: []string{"x"}}, []string{"/entry", "-e", "x"}},
		"own entrypoint":          {in{imgEntry: e, imgCmd: c, entry: []string{"/own"}}, []string{"/own"}},
		"own both":                {in{imgEntry: e, imgCmd: c, entry: []string{"/own"}, cmd: []string{"x", "y"}}, []string{"/own", "x", "y"}},
		"no entrypoint, command":  {in{imgEntry: e, imgCmd: c, clear: true, cmd: []string{"x"}}, []string{"x"}},
		"no entrypoint, nothing":  {in{imgEntry: e, imgCmd: c, clear: true}, nil},
		"nothing":                 {in{}, nil},
		"empty":                   {in{imgCmd: []string{""}}, nil},
		"entrypoint over nothing": {in{entry: []string{"/own"}}, []string{"/own"}},
	} {
		cfg := &v1.ConfigFile{Config: v1.Config{Entrypoint: x.in.imgEntry, Cmd: x.in.imgCmd}}
		got, err := ResolveCommand(cfg, x.in.entry, x.in.clear, x.in.cmd)
		if d := cmp.Diff(x.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if (x.want == nil) != errors.Is(err, ErrNoCommand) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	// The image's slices must not be written to.
	long := make([]string, 1, 8)
	long[0] = "/entry"
	cfg := &v1.ConfigFile{Config: v1.Config{Entrypoint: long}}
	one, _ := ResolveCommand(cfg, nil, false, []string{"a"})
	two, _ := ResolveCommand(cfg, nil, false, []string{"b"})
	if fmt.Sprint(one, two) != "[/entry a] [/entry b]" {
		t.Errorf("%v %v", one, two)
	}
}
