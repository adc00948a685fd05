package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// maxDocument bounds manifests, indexes and configurations, in bytes.
const maxDocument = 8 << 20

// source is an image that is not yet in the store, wherever it comes from. Its
// documents are verified, its layers not yet.
type source struct {
	id       string
	manifest []byte
	config   []byte
	layers   []layer
}

// layer of a source.
type layer struct {
	// digest of the bytes that open returns, or empty when only the content is
	// known (docker archives). name is what people are shown.
	digest, name string
	// diffID is the digest of the uncompressed layer.
	diffID string
	// size of what open returns, in bytes.
	size int64
	// remote says that the layer must be downloaded first.
	remote bool
	open   func(ctx context.Context) (io.ReadCloser, error)
}

// blobs fetches a document by its descriptor; it need not verify it.
type blobs interface {
	document(ctx context.Context, d v1.Descriptor) ([]byte, error)
	layer(m types.MediaType, d v1.Descriptor) layer
}

// newSource reads an image's configuration and checks that the documents fit
// together and to the platform.
func newSource(ctx context.Context, b blobs, manifest []byte, platform v1.Platform) (*source, error) {
	m, err := parseManifest(manifest)
	if err != nil {
		return nil, err
	}
	config, err := verified(ctx, b, m.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	cfg, err := parseConfig(config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w: %w", ErrCorrupt, err)
	}
	// Very old images don't name a platform; they all are for this one.
	if have := cfg.Platform(); have != nil && have.OS != "" && !suits(*have, platform) {
		return nil, fmt.Errorf("%w: it is for %s, this needs %s", ErrNoPlatform, have, platform)
	}
	if len(cfg.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("%w: %d layers, but %d in the configuration; it is not a container image", ErrCorrupt, len(m.Layers), len(cfg.RootFS.DiffIDs))
	}
	s := &source{id: digestOf(manifest), manifest: manifest, config: config}
	for i, d := range m.Layers {
		if d.Digest.Algorithm != "sha256" || cfg.RootFS.DiffIDs[i].Algorithm != "sha256" {
			return nil, fmt.Errorf("%w: layer %s has a digest that is not SHA-256", ErrCorrupt, d.Digest)
		}
		if d.Size < 0 {
			return nil, fmt.Errorf("%w: layer %s of %d bytes", ErrCorrupt, d.Digest, d.Size)
		}
		l := b.layer(d.MediaType, d)
		l.digest, l.name, l.size = d.Digest.String(), d.Digest.String(), d.Size
		l.diffID = cfg.RootFS.DiffIDs[i].String()
		s.layers = append(s.layers, l)
	}
	return s, nil
}

func parseManifest(b []byte) (*v1.Manifest, error) {
	m, err := v1.ParseManifest(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w: %w", ErrCorrupt, err)
	}
	if m.SchemaVersion == 1 {
		return nil, fmt.Errorf("read manifest: %w: its format of 2015 is not supported; push it again with a newer docker", ErrCorrupt)
	}
	if m.Config.Digest.Algorithm != "sha256" {
		return nil, fmt.Errorf("read manifest: %w: it names no configuration", ErrCorrupt)
	}
	return m, nil
}

func parseConfig(b []byte) (*v1.ConfigFile, error) {
	cfg := &v1.ConfigFile{}
	if err := json.Unmarshal(b, cfg); err != nil {
		return nil, err
	}
	return cfg, nil
}

// verified gets a document and checks its digest.
func verified(ctx context.Context, b blobs, d v1.Descriptor) ([]byte, error) {
	if d.Size < 0 || d.Size > maxDocument {
		return nil, fmt.Errorf("%w: %s has %d bytes", ErrCorrupt, d.Digest, d.Size)
	}
	doc, err := b.document(ctx, d)
	if err != nil {
		return nil, err
	}
	if got := digestOf(doc); got != d.Digest.String() {
		return nil, fmt.Errorf("%w: wrong digest: %s is wanted, what came is %s", ErrCorrupt, d.Digest, got)
	}
	return doc, nil
}

func digestOf(b []byte) string {
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		panic(err) // a bytes.Reader does not fail
	}
	return h.String()
}

// suits says whether an image for have runs where want is asked for.
func suits(have, want v1.Platform) bool {
	return have.OS == want.OS && have.Architecture == want.Architecture &&
		(want.Variant == "" || have.Variant == want.Variant)
}

// choose returns the manifest for the platform: doc itself if it is a manifest,
// else the one that the index doc leads to.
func choose(ctx context.Context, b blobs, doc []byte, platform v1.Platform, depth int) ([]byte, error) {
	idx, ok := asIndex(doc)
	if !ok {
		return doc, nil
	}
	if depth > 4 {
		return nil, fmt.Errorf("read index: %w: indexes within indexes", ErrCorrupt)
	}
	var have []string
	for _, d := range idx.Manifests {
		if !d.MediaType.IsImage() && !d.MediaType.IsIndex() && d.MediaType != "" {
			continue
		}
		if p := d.Platform; p != nil && !suits(*p, platform) {
			// Attestations call themselves unknown/unknown.
			if p.OS != "unknown" {
				have = append(have, p.String())
			}
			continue
		}
		child, err := verified(ctx, b, d)
		if err != nil {
			return nil, fmt.Errorf("read manifest: %w", err)
		}
		child, err = choose(ctx, b, child, platform, depth+1)
		if err == nil && d.Platform == nil {
			// Only the configuration tells for which platform it is.
			_, err = newSource(ctx, b, child, platform)
		}
		switch {
		case err == nil:
			return child, nil
		case !isNoPlatform(err):
			return nil, err
		}
	}
	slices.Sort(have)
	hint := ""
	if len(have) > 0 {
		hint = ", only for " + strings.Join(slices.Compact(have), ", ")
	}
	return nil, fmt.Errorf("%w: it is not there for %s%s", ErrNoPlatform, platform, hint)
}

// asIndex returns doc as an index, if it is one.
func asIndex(doc []byte) (*v1.IndexManifest, bool) {
	idx, err := v1.ParseIndexManifest(bytes.NewReader(doc))
	if err != nil || idx.Manifests == nil || (idx.MediaType != "" && !idx.MediaType.IsIndex()) {
		return nil, false
	}
	return idx, true
}
