package supervisor

import (
	"context"

	"fcvm/internal/api"
	"fcvm/internal/metrics"
)

// Metrics implements [api.Backend].
func (s *Supervisor) Metrics(ctx context.Context) ([]byte, error) {
	st, err := s.Stats(ctx, "")
	if err != nil {
		return nil, err
	}
	return metrics.Text(s.o.Version, s.List(ctx), st), nil
}

// serveMetrics begins to serve metrics by TCP where that is wanted, until the
// supervisor ends.
func (s *Supervisor) serveMetrics(ctx context.Context) error {
	if s.o.Metrics == "" {
		return nil
	}
	l, err := api.ListenMetrics(ctx, s.o.Metrics)
	if err != nil {
		return err
	}
	s.log.Info("serving metrics", "address", l.Addr())
	s.spawn(func() {
		if err := api.ServeMetrics(s.life, l, s, s.log); err != nil {
			s.log.Error("serving metrics ended", "error", err)
		}
	})
	return nil
}
