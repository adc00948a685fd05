package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archiveManifest is the file in an archive of `docker save` that describes it.
const archiveManifest = "manifest.json"

// saved is an open archive of `docker save`. Layers are read from where they
// lie in it.
type saved struct {
	f     *os.File
	files map[string]span
	links map[string]string
}

// span is where the content of a file lies.
type span struct{ off, size int64 }

// savedImage is an element of manifest.json.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// openSaved notes where everything lies. f must stay open.
func openSaved(ctx context.Context, f *os.File) (*saved, error) {
	s := &saved{f: f, files: map[string]span{}, links: map[string]string{}}
	tr := tar.NewReader(f)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return nil, fmt.Errorf("read archive: %w: %w", ErrCorrupt, err)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			// The tar reader does not read ahead, so the file stands where the
			// content begins.
			off, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, fmt.Errorf("read archive: %w", err)
			}
			s.files[name] = span{off, h.Size}
		case tar.TypeSymlink:
			// Older versions of docker save equal layers once.
			s.links[name] = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeLink:
			s.links[name] = path.Clean(h.Linkname)
		}
	}
}

func (s *saved) find(name string) (span, error) {
	name = path.Clean(name)
	for range 8 {
		if p, ok := s.files[name]; ok {
			return p, nil
		}
		to, ok := s.links[name]
		if !ok {
			break
		}
		name = to
	}
	return span{}, fmt.Errorf("read archive: %w: %q is missing", ErrCorrupt, name)
}

func (s *saved) read(name string) ([]byte, error) {
	p, err := s.find(name)
	if err != nil {
		return nil, err
	}
	if p.size > maxDocument {
		return nil, fmt.Errorf("read archive: %w: %q is too large", ErrCorrupt, name)
	}
	b := make([]byte, p.size)
	if _, err := s.f.ReadAt(b, p.off); err != nil {
		return nil, fmt.Errorf("read archive: %w: %q: %w", ErrCorrupt, name, err)
	}
	return b, nil
}

// images returns the images of the archive: the one that from names, or all.
func (s *saved) images(_ context.Context, from reference, platform v1.Platform) ([]named, error) {
	doc, err := s.read(archiveManifest)
	if err != nil {
		return nil, err
	}
	var all []savedImage
	if err := json.Unmarshal(doc, &all); err != nil {
		return nil, fmt.Errorf("read archive: %w: %s: %w", ErrCorrupt, archiveManifest, err)
	}
	want := ""
	if from.tag != "" {
		r, err := parseReference(from.tag)
		if err != nil {
			return nil, err
		}
		want = r.String()
	}
	var out []named
	var tags []string
	for _, si := range all {
		names := fullNames(si.RepoTags, from)
		tags = append(tags, si.RepoTags...)
		if want != "" && !slices.Contains(names, want) {
			continue
		}
		src, err := s.source(si, platform)
		if err != nil {
			return nil, err
		}
		out = append(out, named{src, names})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: no image %q in %s, only %s", ErrUnknown, from.tag, from.path, strings.Join(tags, ", "))
	}
	return out, nil
}

// source describes the image as an OCI manifest with uncompressed layers would:
// the archive has no manifest with a digest of its own.
func (s *saved) source(si savedImage, platform v1.Platform) (*source, error) {
	config, err := s.read(si.Config)
	if err != nil {
		return nil, err
	}
	cfg, err := parseConfig(config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w: %w", ErrCorrupt, err)
	}
	if have := cfg.Platform(); have != nil && have.OS != "" && !suits(*have, platform) {
		return nil, fmt.Errorf("%w: it is for %s, this needs %s", ErrNoPlatform, have, platform)
	}
	if len(cfg.RootFS.DiffIDs) != len(si.Layers) {
		return nil, fmt.Errorf("read archive: %w: %d layers, but %d in the configuration", ErrCorrupt, len(si.Layers), len(cfg.RootFS.DiffIDs))
	}
	hash, err := v1.NewHash(digestOf(config))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1,
		Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: hash},
	}
	src := &source{config: config}
	for i, name := range si.Layers {
		p, err := s.find(name)
		if err != nil {
			return nil, err
		}
		diff := cfg.RootFS.DiffIDs[i]
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: types.OCIUncompressedLayer, Size: p.size, Digest: diff})
		src.layers = append(src.layers, layer{
			name: diff.String(), diffID: diff.String(), size: p.size,
			open: func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(io.NewSectionReader(s.f, p.off, p.size)), nil
			},
		})
	}
	if src.manifest, err = json.Marshal(m); err != nil {
		return nil, fmt.Errorf("describe image: %w", err)
	}
	src.id = digestOf(src.manifest)
	return src, nil
}
