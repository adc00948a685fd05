package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Registry is a container registry in this process. It keeps images in memory.
type Registry struct {
	addr string
	srv  *http.Server
	done chan error
	once sync.Once
	err  error // of Close
}

// Serve starts a registry on a free port of 127.0.0.1. It runs until Close; ctx
// only bounds the start.
func Serve(ctx context.Context) (*Registry, error) {
	return ServeHandler(ctx, func(h http.Handler) http.Handler { return h })
}

// ServeHandler is Serve with something between the clients and the registry, so
// that tests can break it.
func ServeHandler(ctx context.Context, wrap func(http.Handler) http.Handler) (*Registry, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	quiet := log.New(io.Discard, "", 0)
	r := &Registry{
		addr: l.Addr().String(),
		srv: &http.Server{
			Handler:           wrap(registry.New(registry.Logger(quiet))),
			ErrorLog:          quiet,
			ReadHeaderTimeout: time.Minute,
		},
		done: make(chan error, 1),
	}
	go func() { r.done <- r.srv.Serve(l) }()
	return r, nil
}

// Addr is host:port, which names of images start with.
func (r *Registry) Addr() string { return r.addr }

// Close ends the registry and its connections, and waits for it. It may be
// called again.
func (r *Registry) Close() error {
	r.once.Do(func() {
		r.err = r.srv.Close()
		if err := <-r.done; !errors.Is(err, http.ErrServerClosed) {
			r.err = errors.Join(r.err, err)
		}
	})
	return r.err
}

// Push puts img into the registry under a name such as "nginx:latest".
func (r *Registry) Push(ctx context.Context, ref string, img v1.Image) error {
	n, err := name.ParseReference(r.addr + "/" + ref)
	if err != nil {
		return fmt.Errorf("push image: %w", err)
	}
	if err := remote.Write(n, img, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("push image %s: %w", ref, err)
	}
	return nil
}
