package images_test

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"fcvm/internal/image"
	"fcvm/internal/image/erofs/erofstest"
	"fcvm/test/images"
)

// cacheDir returns the package cache, and skips where packages can't be had.
func cacheDir(t *testing.T) string {
	t.Helper()
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("images are built from Debian's packages: %v", err)
		}
	}
	dir, err := images.CacheDir()
	if err != nil {
		return t.TempDir()
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return t.TempDir()
	}
	return dir
}

func build(t *testing.T, name, cache string) v1.Image {
	t.Helper()
	img, err := images.Build(context.Background(), name, cache)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func digest(t *testing.T, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// pull brings img through a registry into a store and reads what is there.
func pull(t *testing.T, img v1.Image) (*image.Image, map[string]erofstest.File) {
	t.Helper()
	ctx := context.Background()
	r, err := images.Serve(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	if err := r.Push(ctx, "app:v1", img); err != nil {
		t.Fatal(err)
	}
	s, err := image.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Pull(ctx, r.Addr()+"/app:v1", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return got, erofstest.Check(t, got.RootFS)
}

func TestNginx(t *testing.T) {
	cache := cacheDir(t)
	img := build(t, "nginx", cache)
	if again := build(t, "nginx", cache); digest(t, again) != digest(t, img) {
		t.Error("two builds differ")
	}
	got, files := pull(t, img)
	if got.ID != digest(t, img) {
		t.Errorf("ID is %s", got.ID)
	}
	cfg := got.Config.Config
	if strings.Join(cfg.Cmd, " ") != "nginx -g daemon off;" || cfg.StopSignal != "SIGQUIT" {
		t.Errorf("configuration: %+v", cfg)
	}
	if _, ok := cfg.ExposedPorts["80/tcp"]; !ok {
		t.Error("port 80 is not exposed")
	}
	for name, mode := range map[string]fs.FileMode{
		"usr/sbin/nginx": 0o755, "bin/busybox": 0o755, "etc/nginx/nginx.conf": 0o644, "etc/nginx/mime.types": 0o644,
		"usr/share/nginx/html/index.html": 0o644, "tmp": fs.ModeDir | fs.ModeSticky | 0o777,
		"var/log/nginx/access.log": fs.ModeSymlink | 0o777, "bin/sh": fs.ModeSymlink | 0o777,
		"var/lib/nginx": fs.ModeDir | 0o755,
	} {
		if f, ok := files[name]; !ok || f.Mode != mode {
			t.Errorf("%s: %v, want %v", name, f.Mode, mode)
		}
	}
	if files["var/lib/nginx"].UID != 101 {
		t.Errorf("owner of var/lib/nginx: %d", files["var/lib/nginx"].UID)
	}
	for name := range files {
		if strings.Contains(name, ".wh.") || strings.HasPrefix(name, "etc/nginx/sites-") || strings.HasPrefix(name, "usr/share/man") {
			t.Errorf("%s should not be there", name)
		}
	}
	loader := slices.ContainsFunc([]string{"lib64/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2"}, func(n string) bool {
		_, ok := files[n]
		return ok
	})
	if !loader {
		t.Error("no dynamic loader")
	}
	runNginx(t, got.RootFS)
}

// runNginx lets the server check its configuration, inside the image.
func runNginx(t *testing.T, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Log("nginx was not tried: chroot needs root")
		return
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", path, dir).CombinedOutput(); err != nil {
		t.Logf("nginx was not tried: mount: %v: %s", err, out)
		return
	}
	defer func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	// All that it would write to is given another place; its logs lead through
	// /dev and /proc.
	cmd := exec.Command("unshare", "--mount", "sh", "-c",
		`mount -t tmpfs t "$0/run" && mount -t tmpfs t "$0/var/lib/nginx" && mount --rbind /dev "$0/dev" && mount -t proc p "$0/proc" && exec chroot "$0" nginx -t`, dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "test is successful") {
		t.Errorf("nginx -t: %v\n%s", err, out)
	}
}

func TestBusybox(t *testing.T) {
	cache := cacheDir(t)
	img := build(t, "busybox", cache)
	if again := build(t, "busybox", cache); digest(t, again) != digest(t, img) {
		t.Error("two builds differ")
	}
	got, files := pull(t, img)
	if strings.Join(got.Config.Config.Cmd, " ") != "sh" {
		t.Errorf("command: %v", got.Config.Config.Cmd)
	}
	for _, applet := range []string{"bin/sh", "bin/ls", "bin/cat", "usr/bin/env", "bin/sleep", "usr/bin/id"} {
		if files[applet].Target != "/bin/busybox" {
			t.Errorf("%s: %+v", applet, files[applet])
		}
	}
	if home := files["home/app"]; home.UID != images.AppUID || !home.Mode.IsDir() {
		t.Errorf("home of %s: %+v", images.AppUser, home)
	}
	if !strings.Contains(files["etc/passwd"].Data, "app:x:1000:") {
		t.Error("no user app")
	}
}

func TestAdd(t *testing.T) {
	cache := cacheDir(t)
	base := build(t, "busybox", cache)
	prog := filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(prog, []byte("program"), 0o600); err != nil {
		t.Fatal(err)
	}
	img, err := images.AddProgram(base, prog, "/bin/prog")
	if err != nil {
		t.Fatal(err)
	}
	img, err = images.Add(img, images.File{Path: "/etc/passwd", Whiteout: true}, images.File{Path: "/d", Dir: true, UID: 7}, images.File{Path: "/d/l", Link: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if img, err = images.WithConfig(img, func(c *v1.Config) { c.Cmd = nil }); err != nil {
		t.Fatal(err)
	}
	got, files := pull(t, img)
	if f := files["bin/prog"]; f.Data != "program" || f.Mode != 0o755 {
		t.Errorf("program: %+v", f)
	}
	if _, ok := files["etc/passwd"]; ok {
		t.Error("a whiteout removes nothing")
	}
	if files["d"].UID != 7 || files["d/l"].Target != "x" {
		t.Errorf("%+v %+v", files["d"], files["d/l"])
	}
	if _, err := image.ResolveCommand(&got.Config, nil, false, nil); err == nil {
		t.Error("WithConfig changed nothing")
	}
	if _, err := images.Add(base, images.File{Path: "/"}); err == nil {
		t.Error("the root is accepted as a file")
	}
	if _, err := images.AddProgram(base, "/nonexistent", "/x"); err == nil {
		t.Error("a missing program is accepted")
	}
}

func TestUnknownImage(t *testing.T) {
	if _, err := images.Build(context.Background(), "windows", t.TempDir()); err == nil || !strings.Contains(err.Error(), "nginx") {
		t.Errorf("error is %v", err)
	}
}

// Layers say nothing about who built them and when.
func TestReproducible(t *testing.T) {
	img := build(t, "busybox", cacheDir(t))
	r := mutate.Extract(img)
	defer func() { _ = r.Close() }()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uname != "" || h.Gname != "" || !h.AccessTime.IsZero() || !h.ChangeTime.IsZero() {
			t.Errorf("%s: %q %q %v %v", h.Name, h.Uname, h.Gname, h.AccessTime, h.ChangeTime)
		}
	}
}
