package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// headerTimeout is how long a registry may take to begin its answer.
const headerTimeout = time.Minute

// registry is the blobs of one repository.
type registry struct {
	repo   name.Repository
	puller *remote.Puller
	stall  time.Duration
}

// resolveRemote asks the registry for the image that ref names.
func (s *Store) resolveRemote(ctx context.Context, ref name.Reference, platform v1.Platform) (*source, error) {
	base, ok := remote.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, errors.New("registry transport is of an unknown type")
	}
	base = base.Clone()
	base.ResponseHeaderTimeout = headerTimeout
	puller, err := remote.NewPuller(
		remote.WithAuthFromKeychain(authn.NewMultiKeychain(authn.DefaultKeychain, podmanKeychain{})),
		remote.WithTransport(plainOnlyLocal{base}),
		remote.WithRetryBackoff(s.backoff),
		remote.WithUserAgent("fcvm"),
	)
	if err != nil {
		return nil, fmt.Errorf("prepare registry access: %w", err)
	}
	r := &registry{repo: ref.Context(), puller: puller, stall: s.stall}
	desc, err := puller.Get(ctx, ref)
	if err != nil {
		return nil, registryError(ctx, err)
	}
	// The library verifies this only if it was asked for by digest; for a tag
	// there is nothing to compare with.
	doc, err := choose(ctx, r, desc.Manifest, platform, 0)
	if err != nil {
		return nil, err
	}
	return newSource(ctx, r, doc, platform)
}

func (r *registry) document(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if d.MediaType.IsImage() || d.MediaType.IsIndex() {
		desc, err := r.puller.Get(ctx, r.repo.Digest(d.Digest.String()))
		if err != nil {
			return nil, registryError(ctx, err)
		}
		return desc.Manifest, nil
	}
	rc, err := r.blob(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rc.Close() }()
	b := make([]byte, d.Size) // the caller has bounded it
	if n, err := io.ReadFull(rc, b); err != nil {
		return nil, fmt.Errorf("%w: %s broke off after %d of %d bytes: %w", ErrRegistry, d.Digest, n, d.Size, err)
	}
	return b, nil
}

func (r *registry) layer(_ types.MediaType, d v1.Descriptor) layer {
	return layer{remote: true, open: func(ctx context.Context) (io.ReadCloser, error) { return r.blob(ctx, d) }}
}

// blob downloads; errors of the reader are errors of the registry.
func (r *registry) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	l, err := r.puller.Layer(ctx, r.repo.Digest(d.Digest.String()))
	var rc io.ReadCloser
	if err == nil {
		rc, err = l.Compressed()
	}
	if err != nil {
		err = registryError(ctx, err)
		cancel(nil)
		return nil, err
	}
	b := &body{rc: rc, ctx: ctx, cancel: cancel, stall: r.stall}
	b.timer = time.AfterFunc(r.stall, func() {
		cancel(fmt.Errorf("%w: it sent nothing for %v", ErrRegistry, r.stall))
	})
	return b, nil
}

// body of an answer that is given up when nothing comes any more.
type body struct {
	rc     io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	stall  time.Duration
	timer  *time.Timer
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.rc.Read(p)
	if n > 0 {
		b.timer.Reset(b.stall)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = registryError(b.ctx, err)
	}
	return n, err
}

func (b *body) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.rc.Close()
}

// registryError sorts what the registry library returns into our sentinels.
func registryError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var te *transport.Error
	if !errors.As(err, &te) {
		if errors.Is(err, errPlain) {
			return err
		}
		// The library has no type for this one.
		if strings.Contains(err.Error(), "does not match requested digest") {
			return fmt.Errorf("%w: wrong digest: %w", ErrCorrupt, err)
		}
		return fmt.Errorf("%w: %w", ErrRegistry, err)
	}
	switch te.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: %w; the image does not exist, or it needs `docker login` or `podman login`", ErrUnauthorized, err)
	case http.StatusNotFound:
		return fmt.Errorf("%w in the registry: %w", ErrUnknown, err)
	case http.StatusTooManyRequests:
		return fmt.Errorf("%w: %w; it limits how often it is asked: wait, or log in", ErrRegistry, err)
	}
	return fmt.Errorf("%w: %w", ErrRegistry, err)
}

func isNoPlatform(err error) bool { return errors.Is(err, ErrNoPlatform) }

// errPlain means that a registry would be spoken to without encryption.
var errPlain = errors.New("plain HTTP is only for registries on this host")

// plainOnlyLocal refuses unencrypted connections, with whatever credentials, to
// other hosts. The registry library would make some: to private addresses and
// to names under .local, and wherever a registry redirects to.
type plainOnlyLocal struct{ next http.RoundTripper }

func (t plainOnlyLocal) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !isLocal(r.URL.Hostname()) {
		return nil, fmt.Errorf("reach %s: %w", r.URL.Host, errPlain)
	}
	return t.next.RoundTrip(r)
}

func isLocal(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && (ip.Equal(net.IPv6loopback) || ip.Equal(net.IPv4(127, 0, 0, 1)))
}
