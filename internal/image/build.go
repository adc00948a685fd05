package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"fcvm/internal/image/rootfs"
)

// downloads is how many layers come at once; as docker.
const downloads = 3

// reporter calls a progress function, one call at a time.
type reporter struct {
	mu sync.Mutex // held during calls of f
	f  func(Progress)
}

func (p *reporter) report(x Progress) {
	if p.f == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.f(x)
}

// build makes the image's directory. Its digest is locked.
func (s *Store) build(ctx context.Context, src *source, p *reporter) error {
	dir, cleanup, err := s.stage(ctx)
	if err != nil {
		return err
	}
	defer cleanup()
	final := filepath.Join(dir, "image")
	if err := os.Mkdir(final, 0o700); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	size, err := makeRootFS(ctx, src, dir, filepath.Join(final, rootfsFile), p)
	if err != nil {
		return err
	}
	rec, err := json.MarshalIndent(record{
		Version: schemaVersion, ID: src.id, Manifest: src.manifest, Config: src.config,
		Size: size, Pulled: time.Now().UTC(),
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	if err := writeFile(filepath.Join(final, leaseFile), nil); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(final, manifestFile), rec); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.publish(src.id, final, filepath.Join(dir, "old"))
}

// publish gives an image its final name. One that is there is damaged (build is
// not called otherwise) and goes to old.
func (s *Store) publish(id, from, old string) error {
	to := s.path(dirName(id))
	if err := os.Rename(to, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replace damaged image: %w", err)
	}
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	return syncDir(s.dir)
}

// makeRootFS merges the layers into path while the next ones are downloaded.
func makeRootFS(ctx context.Context, src *source, dir, path string, p *reporter) (int64, error) {
	out, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return 0, fmt.Errorf("make file system: %w", err)
	}
	defer func() { _ = out.Close() }()
	spool, err := os.OpenFile(filepath.Join(dir, "tails"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, fmt.Errorf("make file system: %w", err)
	}
	defer func() { _ = spool.Close() }()
	b := rootfs.New(out, spool, rootfs.Limits{})

	g, ctx := errgroup.WithContext(ctx)
	slots := make(chan struct{}, downloads)
	ready := make([]chan struct{}, len(src.layers))
	for i, l := range src.layers {
		ready[i] = make(chan struct{})
		if !l.remote {
			close(ready[i])
			continue
		}
		g.Go(func() error {
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
			case <-ctx.Done():
				return ctx.Err()
			}
			if err := download(ctx, l, layerFile(dir, i), p); err != nil {
				return fmt.Errorf("download layer %d of %d, %s: %w", i+1, len(src.layers), l.name, err)
			}
			close(ready[i])
			return nil
		})
	}
	g.Go(func() error {
		for i, l := range src.layers {
			select {
			case <-ready[i]:
			case <-ctx.Done():
				return ctx.Err()
			}
			if l.remote {
				file := layerFile(dir, i)
				// Its digest was checked when it came.
				l.digest = ""
				l.open = func(context.Context) (io.ReadCloser, error) {
					f, err := os.Open(file)
					if err == nil {
						err = os.Remove(file) // gives the space back when closed
					}
					return f, err
				}
			}
			if err := merge(ctx, b, l, p); err != nil {
				return fmt.Errorf("merge layer %d of %d, %s: %w", i+1, len(src.layers), l.name, err)
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return 0, err
	}
	p.report(Progress{Stage: StageSync})
	size, err := b.Finish()
	if err != nil {
		return 0, err
	}
	if err := out.Sync(); err != nil {
		return 0, fmt.Errorf("make file system: %w", err)
	}
	return size, nil
}

func layerFile(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("layer-%d", i)) }

// download writes a layer to path and verifies it.
func download(ctx context.Context, l layer, path string, p *reporter) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("keep layer: %w", err)
	}
	defer func() { _ = f.Close() }()
	rc, err := l.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = rc.Close() }()
	m := newMeter(rc, StageDownload, l, p)
	// One byte more shows that there are too many.
	n, err := io.Copy(f, io.LimitReader(m, l.size+1))
	if err := ctx.Err(); err != nil {
		return err
	}
	// The registry library verifies too, but its error has no type.
	if n >= l.size {
		if got := m.digest(); n > l.size || got != l.digest {
			return fmt.Errorf("%w: wrong digest: what came is %s, and %d bytes instead of %d", ErrCorrupt, got, n, l.size)
		}
	}
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", n, l.size, err)
	}
	if n < l.size {
		return fmt.Errorf("%w: it broke off after %d of %d bytes", ErrRegistry, n, l.size)
	}
	return nil
}

// merge applies a layer and verifies its digests.
func merge(ctx context.Context, b *rootfs.Builder, l layer, p *reporter) error {
	rc, err := l.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = rc.Close() }()
	m := newMeter(rc, StageMerge, l, p)
	z, err := inflate(m)
	if err != nil {
		return blame(ctx, err)
	}
	defer func() { _ = z.Close() }()
	content := sha256.New()
	tee := io.TeeReader(z, content)
	err = b.Apply(ctx, tee)
	if err == nil {
		// Archives end before their last bytes do.
		_, err = io.Copy(io.Discard, ctxReader{ctx, tee})
	}
	if err != nil {
		// A wrong digest explains every other trouble.
		_, rerr := io.Copy(io.Discard, ctxReader{ctx, m})
		if got := m.digest(); ctx.Err() == nil && rerr == nil && l.digest != "" && got != l.digest {
			return fmt.Errorf("%w: wrong digest: its bytes are %s", ErrCorrupt, got)
		}
		return blame(ctx, err)
	}
	if _, err := io.Copy(io.Discard, ctxReader{ctx, m}); err != nil {
		return blame(ctx, err)
	}
	if got := m.digest(); l.digest != "" && got != l.digest {
		return fmt.Errorf("%w: wrong digest: its bytes are %s", ErrCorrupt, got)
	}
	if got := digestName(content); got != l.diffID {
		return fmt.Errorf("%w: wrong digest: its content is %s instead of %s", ErrCorrupt, got, l.diffID)
	}
	return nil
}

// blame calls an error corrupt unless it is ours, the disk's or the user's.
func blame(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var errno syscall.Errno
	if errors.As(err, &errno) || errors.Is(err, ErrCorrupt) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrCorrupt, err)
}

func digestName(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// reportEvery is how many bytes lie between two calls of a progress function.
const reportEvery = 1 << 20

// meter hashes what is read through it, and reports.
type meter struct {
	r     io.Reader
	h     hash.Hash
	p     *reporter
	at    Progress
	since int64
}

func newMeter(r io.Reader, stage Stage, l layer, p *reporter) *meter {
	m := &meter{r: r, h: sha256.New(), p: p, at: Progress{Stage: stage, Layer: l.name, Total: l.size}}
	p.report(m.at)
	return m
}

func (m *meter) digest() string { return digestName(m.h) }

func (m *meter) Read(b []byte) (int, error) {
	n, err := m.r.Read(b)
	m.h.Write(b[:n])
	m.at.Done += int64(n)
	if m.since += int64(n); m.since >= reportEvery || m.since > 0 && err != nil {
		m.since = 0
		m.p.report(m.at)
	}
	return n, err
}
