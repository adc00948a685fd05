// Package images makes the container images that tests and the demo run, from
// Debian's packages, so that no registry on the internet is needed: only
// Debian's mirror once, for packages that are then cached. Equal packages give
// equal images, down to the digest.
//
// The maintainer scripts of the packages are not run; what they would have
// made is added as files here.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is when everything that is not from a package was made.
var epoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// File is something to put into a layer: exactly one of Data, Dir, Link and
// Whiteout says what.
type File struct {
	Path     string // absolute, in the image
	Mode     int64  // permissions; 0 means 0644, or 0755 for a directory
	UID, GID int
	Data     []byte
	Dir      bool
	Link     string // the target of a symbolic link
	Whiteout bool   // removes the file that lower layers have
}

// Names lists the images that Build knows.
func Names() []string { return []string{"busybox", "nginx"} }

// CacheDir is where downloaded packages are kept, in the user's cache directory.
func CacheDir() (string, error) {
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find cache directory: %w", err)
	}
	return filepath.Join(d, "fcvm-test", "debs"), nil
}

// Build makes an image: "nginx" or "busybox". Packages that are not yet in
// cacheDir are downloaded with apt-get, as any user.
func Build(ctx context.Context, name, cacheDir string) (v1.Image, error) {
	c := &cache{dir: cacheDir}
	switch name {
	case "nginx":
		return buildNginx(ctx, c)
	case "busybox":
		return buildBusybox(ctx, c)
	}
	return nil, fmt.Errorf("build image %q: unknown; there are %s", name, strings.Join(Names(), ", "))
}

// Add returns base with a layer of files on top.
func Add(base v1.Image, files ...File) (v1.Image, error) {
	l := newTarLayer()
	for _, f := range files {
		if err := l.add(f); err != nil {
			return nil, err
		}
	}
	layer, err := l.layer()
	if err != nil {
		return nil, err
	}
	img, err := mutate.Append(base, mutate.Addendum{Layer: layer, History: history("add files")})
	if err != nil {
		return nil, fmt.Errorf("add layer: %w", err)
	}
	return img, nil
}

// AddProgram returns base with the program at host, a static one, as the
// executable file at path in the image.
func AddProgram(base v1.Image, host, path string) (v1.Image, error) {
	b, err := os.ReadFile(host)
	if err != nil {
		return nil, fmt.Errorf("add program: %w", err)
	}
	return Add(base, File{Path: path, Mode: 0o755, Data: b})
}

// WithConfig returns img after edit changed its configuration.
func WithConfig(img v1.Image, edit func(*v1.Config)) (v1.Image, error) {
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	cf = cf.DeepCopy()
	edit(&cf.Config)
	return mutate.ConfigFile(img, cf)
}

// WriteOCI writes img as an OCI layout to dir, which must be empty or missing,
// for `fcvm run oci:DIR`.
func WriteOCI(dir string, img v1.Image, tag string) error {
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	err = p.AppendImage(img,
		layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag}),
		layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return nil
}

// ReadOCI reads the one image of a layout that [WriteOCI] wrote.
func ReadOCI(dir string) (v1.Image, error) {
	p, err := layout.FromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("read layout: %w", err)
	}
	index, err := p.ImageIndex()
	if err != nil {
		return nil, fmt.Errorf("read layout: %w", err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read layout: %w", err)
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("read layout: %s holds %d images, want one", dir, len(m.Manifests))
	}
	return p.Image(m.Manifests[0].Digest)
}

// assemble makes an image of layers and a configuration.
func assemble(cfg v1.Config, layers ...*tarLayer) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, t := range layers {
		l, err := t.layer()
		if err != nil {
			return nil, err
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: history("debian packages")}); err != nil {
			return nil, fmt.Errorf("append layer: %w", err)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	cf.Created = v1.Time{Time: epoch}
	cf.Config = cfg
	return mutate.ConfigFile(img, cf)
}

func history(by string) v1.History {
	return v1.History{Created: v1.Time{Time: epoch}, CreatedBy: by}
}

// tarLayer collects a layer's entries, so that they can be sorted: one name has
// one entry, the last.
type tarLayer struct {
	entries map[string]tarEntry
}

type tarEntry struct {
	h    *tar.Header
	data []byte
}

func newTarLayer() *tarLayer { return &tarLayer{entries: map[string]tarEntry{}} }

func (t *tarLayer) add(f File) error {
	h := &tar.Header{
		Name: strings.Trim(f.Path, "/"), Mode: f.Mode, Uid: f.UID, Gid: f.GID,
		ModTime: epoch, Format: tar.FormatPAX,
	}
	switch {
	case f.Dir:
		h.Typeflag = tar.TypeDir
		if h.Mode == 0 {
			h.Mode = 0o755
		}
	case f.Link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(len(f.Data))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if f.Whiteout {
			h.Name = filepath.Join(filepath.Dir(h.Name), ".wh."+filepath.Base(h.Name))
		}
	}
	if h.Name == "" {
		return fmt.Errorf("add file: %q is not a path in an image", f.Path)
	}
	t.entries[h.Name] = tarEntry{h, f.Data}
	return nil
}

// has says whether there is an entry of this absolute path.
func (t *tarLayer) has(path string) bool {
	_, ok := t.entries[strings.Trim(path, "/")]
	return ok
}

// copyTar takes over the entries of an archive that keep allows.
func (t *tarLayer) copyTar(r io.Reader, keep func(name string) bool) error {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read package: %w", err)
		}
		name := strings.Trim(strings.TrimPrefix(h.Name, "./"), "/")
		if name == "" || name == "." || !keep(name) {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return fmt.Errorf("read package: %w", err)
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = strings.TrimPrefix(h.Linkname, "./")
		}
		h.Name, h.Uname, h.Gname, h.Format = name, "", "", tar.FormatPAX
		t.entries[name] = tarEntry{h, data}
	}
}

// layer writes the archive. A hard link sorts after its target only by chance,
// so links come last.
func (t *tarLayer) layer() (v1.Layer, error) {
	names := make([]string, 0, len(t.entries))
	for n := range t.entries {
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b string) int {
		la, lb := t.entries[a].h.Typeflag == tar.TypeLink, t.entries[b].h.Typeflag == tar.TypeLink
		if la != lb {
			if la {
				return 1
			}
			return -1
		}
		return strings.Compare(a, b)
	})
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, n := range names {
		e := t.entries[n]
		if err := w.WriteHeader(e.h); err != nil {
			return nil, fmt.Errorf("write layer: %q: %w", n, err)
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, fmt.Errorf("write layer: %q: %w", n, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }
	l, err := tarball.LayerFromOpener(open,
		tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	return l, nil
}
