package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// metricsType is the content type of Prometheus' text format.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) error {
	b, err := s.backend.Metrics(r.Context())
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", metricsType)
	_, _ = w.Write(b) // fails only when the client left
	return nil
}

// ListenMetrics listens for who wants metrics by TCP. It refuses all addresses
// but those of this host's loopback: whoever gets there may read, and names of VMs
// and snapshots are not for the network.
func ListenMetrics(ctx context.Context, address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, invalid("bad address %q for metrics: %v", address, err)
	}
	if ip, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !ip.IsLoopback()) {
		return nil, &Error{
			Code:    CodeInvalid,
			Message: fmt.Sprintf("metrics are served on the loopback only, and %q is not that", address),
			Hint:    "--metrics 127.0.0.1:PORT; a proxy that asks who is there can pass them on",
		}
	}
	var c net.ListenConfig
	l, err := c.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for metrics: %w", err)
	}
	return l, nil
}

// ServeMetrics answers GET /metrics, and nothing else, until ctx ends. It closes l
// and returns when all requests have ended.
func ServeMetrics(ctx context.Context, l net.Listener, b Backend, log *slog.Logger) error {
	mux := http.NewServeMux()
	s := &Server{backend: b, log: log}
	mux.HandleFunc("GET "+pathMetrics, func(w http.ResponseWriter, r *http.Request) {
		if err := s.metrics(w, r); err != nil {
			s.fail(w, r, err)
		}
	})
	server := http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Shutdown(context.Background()) })
	err := server.Serve(l)
	if !stop() {
		// Serve returns as soon as Shutdown begins; this waits for its end, which is
		// near: the requests' context has ended as well.
		_ = server.Shutdown(context.Background())
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve metrics: %w", err)
}
