//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/rogpeppe/go-internal/testscript"

	"fcvm/internal/datadir"
)

// TestMain makes the test binary be fcvm where it is called so.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"fcvm": main})
}

// newLayout opens a data directory in which the guest is set up, as far as the
// CLI looks.
func newLayout(t *testing.T) *datadir.Layout {
	t.Helper()
	l, err := datadir.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	// As a supervisor does.
	if err := os.MkdirAll(l.Runtime, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(l.Runtime) })
	setUpGuest(t, l.Guest())
	return l
}

func setUpGuest(t testing.TB, dir string) {
	t.Helper()
	digest := strings.Repeat("0", 64)
	for name, text := range map[string]string{
		"guest.json":                            fmt.Sprintf(`{"format":1,"kernel_digest":"sha256:%s","initrd_digest":"sha256:%s"}`, digest, digest),
		"vmlinuz-" + digest[:16]:                "a kernel",
		"initramfs-" + digest[:16] + ".cpio.gz": "an initramfs",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// ociDir writes a tiny image and returns its reference. Without a command it has
// none.
func ociDir(t testing.TB, dir string, command ...string) string {
	t.Helper()
	// An empty tar archive: two blocks of zeros.
	layer := static.NewLayer(make([]byte, 1024), types.OCIUncompressedLayer)
	img, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layer)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Config.Cmd = "linux", "amd64", command
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "tiny:1"})); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir
}

// command returns fcvm as a process of its own, on a data directory.
func command(t *testing.T, l *datadir.Layout, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Args = append([]string{"fcvm"}, args...)
	cmd.Env = append(os.Environ(), datadir.EnvDir+"="+l.Dir)
	return cmd
}

// result is how a command ended.
type result struct {
	code        int
	out, errOut string
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d\n--- stdout\n%s--- stderr\n%s", r.code, r.out, r.errOut)
}

func fcvm(t *testing.T, l *datadir.Layout, stdin string, args ...string) result {
	t.Helper()
	cmd := command(t, l, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	return finish(t, cmd.Run(), &out, &errOut)
}

func finish(t *testing.T, err error, out, errOut *bytes.Buffer) result {
	t.Helper()
	r := result{out: out.String(), errOut: errOut.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		t.Fatal(err)
	}
	return r
}
