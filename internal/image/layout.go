package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Annotations that name an image in a layout's index.
const (
	refAnnotation        = "org.opencontainers.image.ref.name"
	containerdAnnotation = "io.containerd.image.name"
)

// ociLayout is a directory in the OCI image layout.
type ociLayout struct{ dir string }

func (l ociLayout) blobPath(h v1.Hash) (string, error) {
	// A hash of a parsed descriptor has only hex digits, but its algorithm…
	if h.Algorithm != "sha256" {
		return "", fmt.Errorf("%w: digest %s is not SHA-256", ErrCorrupt, h)
	}
	return filepath.Join(l.dir, "blobs", h.Algorithm, h.Hex), nil
}

func (l ociLayout) document(_ context.Context, d v1.Descriptor) ([]byte, error) {
	path, err := l.blobPath(d.Digest)
	if err != nil {
		return nil, err
	}
	return readDocument(path)
}

// readDocument reads a file that should be small.
func readDocument(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	if len(b) > maxDocument {
		return nil, fmt.Errorf("read image: %w: %s is too large", ErrCorrupt, path)
	}
	return b, nil
}

func (l ociLayout) layer(_ types.MediaType, d v1.Descriptor) layer {
	return layer{open: func(context.Context) (io.ReadCloser, error) {
		path, err := l.blobPath(d.Digest)
		if err != nil {
			return nil, err
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read image: %w", err)
		}
		return f, nil
	}}
}

// named is a source with the full names that it brings along.
type named struct {
	*source
	names []string
}

// images returns the images of the layout: those that tag names, or all. from
// is how the user named the layout, for images that have no name of their own.
func (l ociLayout) images(ctx context.Context, from reference, platform v1.Platform) ([]named, error) {
	doc, err := readDocument(filepath.Join(l.dir, "index.json"))
	if err != nil {
		return nil, err
	}
	idx, ok := asIndex(doc)
	if !ok {
		return nil, fmt.Errorf("read image: %w: index.json is no index of images", ErrCorrupt)
	}
	var out []named
	var tags []string
	for _, d := range idx.Manifests {
		names := descriptorNames(d)
		tags = append(tags, names...)
		if from.tag != "" && !slices.ContainsFunc(names, func(n string) bool { return n == from.tag || strings.HasSuffix(n, ":"+from.tag) }) {
			continue
		}
		m, err := verified(ctx, l, d)
		if err != nil {
			return nil, fmt.Errorf("read manifest: %w", err)
		}
		m, err = choose(ctx, l, m, platform, 0)
		var src *source
		if err == nil {
			src, err = newSource(ctx, l, m, platform)
		}
		if isNoPlatform(err) && len(idx.Manifests) > 1 && from.tag == "" {
			continue // one index may list the platforms of an image
		}
		if err != nil {
			return nil, err
		}
		out = append(out, named{src, fullNames(names, from)})
	}
	if len(out) == 0 {
		if from.tag != "" {
			return nil, fmt.Errorf("%w: no tag %q in %s, only %s", ErrUnknown, from.tag, from.path, strings.Join(tags, ", "))
		}
		return nil, fmt.Errorf("%w: nothing in %s is for %s", ErrNoPlatform, from.path, platform)
	}
	return out, nil
}

// descriptorNames are the names that an index gives to a manifest.
func descriptorNames(d v1.Descriptor) []string {
	var names []string
	for _, k := range []string{containerdAnnotation, refAnnotation} {
		if n := d.Annotations[k]; n != "" && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// fullNames turns names found in an archive into the store's. A bare tag says
// nothing without the archive's own name.
func fullNames(names []string, from reference) []string {
	var out []string
	for _, n := range names {
		if !strings.ContainsAny(n, ":/@") {
			continue
		}
		if r, err := parseReference(n); err == nil && r.prefix == "" && !slices.Contains(out, r.String()) {
			out = append(out, r.String())
		}
	}
	if len(out) == 0 {
		r := from
		if r.tag == "" && len(names) > 0 {
			r.tag = names[0]
		}
		out = append(out, r.String())
	}
	return out
}

// blobName is what an archive of a layout may contain; all else is passed over.
var blobName = regexp.MustCompile(`^(index\.json|oci-layout|blobs/sha256/[0-9a-f]{64})$`)

// unpackLayout unpacks an archive of a layout into dir, an empty directory.
func unpackLayout(ctx context.Context, r io.Reader, dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700); err != nil {
		return fmt.Errorf("unpack archive: %w", err)
	}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return fmt.Errorf("unpack archive: %w: %w", ErrCorrupt, err)
		}
		name := strings.TrimPrefix(h.Name, "./")
		if h.Typeflag != tar.TypeReg || !blobName.MatchString(name) {
			continue
		}
		if err := unpackFile(ctx, tr, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("unpack archive: %w", err)
		}
	}
}

func unpackFile(ctx context.Context, r io.Reader, path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, ctxReader{ctx, r})
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return errors.Join(err, f.Close())
}

// ctxReader stops when its context ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
