package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Pull returns the image that ref names, from the store or from where the name
// says: a registry, or oci:, oci-archive: and docker-archive: for a local one.
// Errors wrap the sentinels of this package. When ctx ends first, nothing is
// left behind.
func (s *Store) Pull(ctx context.Context, ref string, o PullOptions) (*Image, error) {
	r, err := parseReference(ref)
	if err != nil {
		return nil, err
	}
	platform, err := o.platform()
	if err != nil {
		return nil, err
	}
	switch o.Policy {
	case "", PullMissing:
		if r.prefix != "" {
			break
		}
		img, err := s.Get(ref)
		if idPattern.MatchString(ref) {
			return img, err // an ID says nothing to a registry
		}
		if err == nil || !errors.Is(err, ErrUnknown) && !errors.Is(err, ErrCorrupt) {
			return img, err
		}
	case PullNever:
		return s.Get(ref)
	case PullAlways:
	default:
		return nil, fmt.Errorf("pull image %s: unknown policy %q; it is missing, always or never", ref, o.Policy)
	}
	p := &reporter{f: o.Progress}
	p.report(Progress{Stage: StageResolve})
	img, err := s.pull(ctx, r, platform, p)
	if err != nil {
		return nil, s.explain("pull image "+ref, err)
	}
	p.report(Progress{Stage: StageDone, Done: img.Size, Total: img.Size})
	return img, nil
}

func (s *Store) pull(ctx context.Context, r reference, platform v1.Platform, p *reporter) (*Image, error) {
	if r.prefix == "" {
		src, err := s.resolveRemote(ctx, r.remote, platform)
		if err != nil {
			return nil, err
		}
		return s.add(ctx, src, []string{r.String()}, p)
	}
	images, done, err := s.openLocal(ctx, r, platform)
	if err != nil {
		return nil, err
	}
	defer done()
	if len(images) > 1 {
		var names []string
		for _, i := range images {
			names = append(names, i.names...)
		}
		return nil, fmt.Errorf("%w: it holds several images: %s; name one, as in %s:TAG, or `fcvm image load` all", ErrAmbiguous, strings.Join(names, ", "), r)
	}
	return s.add(ctx, images[0].source, []string{r.String()}, p)
}

// Load brings all images of a local archive or layout into the store, under the
// names that they have there. path may start with oci:, oci-archive: or
// docker-archive:; without, what it is is seen from its content. "-" reads an
// archive from standard input. The policy is ignored.
func (s *Store) Load(ctx context.Context, path string, o PullOptions) ([]*Image, error) {
	platform, err := o.platform()
	if err != nil {
		return nil, err
	}
	p := &reporter{f: o.Progress}
	p.report(Progress{Stage: StageResolve})
	all, err := s.load(ctx, path, platform, p)
	if err != nil {
		return nil, s.explain("load images from "+path, err)
	}
	return all, nil
}

func (s *Store) load(ctx context.Context, path string, platform v1.Platform, p *reporter) ([]*Image, error) {
	path, cleanup, err := s.spoolStdin(ctx, path)
	if err != nil {
		return nil, err
	}
	defer cleanup()
	r, err := detect(path)
	if err != nil {
		return nil, err
	}
	images, done, err := s.openLocal(ctx, r, platform)
	if err != nil {
		return nil, err
	}
	defer done()
	var all []*Image
	for _, i := range images {
		img, err := s.add(ctx, i.source, i.names, p)
		if err != nil {
			return nil, err
		}
		p.report(Progress{Stage: StageDone, Done: img.Size, Total: img.Size})
		all = append(all, img)
	}
	return all, nil
}

func (o PullOptions) platform() (v1.Platform, error) {
	s := o.Platform
	if s == "" {
		s = DefaultPlatform
	}
	p, err := v1.ParsePlatform(s)
	if err != nil {
		return v1.Platform{}, fmt.Errorf("parse platform %q: %w; write it like %s", s, err, DefaultPlatform)
	}
	if p.OS == "" || p.Architecture == "" {
		return v1.Platform{}, fmt.Errorf("parse platform %q: write it like %s", s, DefaultPlatform)
	}
	return *p, nil
}

// explain adds what was tried, and what to do about a full disk.
func (s *Store) explain(what string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: %w in %s: free some, for example with `fcvm image rm`, or use another --data-dir: %w", what, ErrNoSpace, s.dir, err)
	}
	if errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrUnknown) {
		return fmt.Errorf("%s: %w: %w", what, ErrUnknown, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// add brings a source into the store, unless it is there, and names it.
func (s *Store) add(ctx context.Context, src *source, names []string, p *reporter) (*Image, error) {
	unlock, err := s.lockDigest(ctx, src.id, func() { p.report(Progress{Stage: StageWait}) })
	if err != nil {
		return nil, err
	}
	defer unlock()
	_, err = s.read(src.id, nil)
	switch {
	case errors.Is(err, ErrUnknown), errors.Is(err, ErrCorrupt):
		if err := s.build(ctx, src, p); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	}
	if err := s.tag(ctx, src.id, names); err != nil {
		return nil, err
	}
	refs, err := s.readRefs()
	if err != nil {
		return nil, err
	}
	return s.read(src.id, refs)
}

// openLocal opens an image on the local disk; done releases it.
func (s *Store) openLocal(ctx context.Context, r reference, platform v1.Platform) (images []named, done func(), err error) {
	if r.prefix == layoutPrefix {
		images, err = ociLayout{r.path}.images(ctx, r, platform)
		return images, func() {}, err
	}
	f, err := os.Open(r.path)
	if err != nil {
		return nil, nil, fmt.Errorf("open archive: %w", err)
	}
	closeFile := func() { _ = f.Close() }
	dir, cleanup, err := s.stage(ctx)
	if err != nil {
		closeFile()
		return nil, nil, err
	}
	done = func() { closeFile(); cleanup() }
	if r.prefix == ociArchive {
		images, err = openArchive(ctx, f, dir, r, platform)
	} else {
		images, done, err = openDocker(ctx, f, dir, r, platform, done)
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return images, done, nil
}
