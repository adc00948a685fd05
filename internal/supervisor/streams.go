package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"

	"fcvm/internal/api"
	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/proto"
)

// Exec implements [api.Backend].
func (s *Supervisor) Exec(ctx context.Context, name string, req api.ExecRequest) (io.ReadWriteCloser, error) {
	m, c, err := s.dial(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(req.Command) == 0 || req.Command[0] == "" {
		return nil, invalid("no command to execute")
	}
	if err := checkEnv(req.Env); err != nil {
		return nil, err
	}
	m.mu.Lock()
	env := mergeEnv(m.rec.ClientEnv, req.Env)
	m.mu.Unlock()
	st, err := c.Exec(ctx, proto.ExecRequest{
		Args: req.Command, Env: env, WorkDir: req.WorkDir, User: req.User, TTY: req.TTY, Stdin: req.Stdin,
		Rows: req.Rows, Cols: req.Cols,
	})
	return st, m.explain("execute in", err)
}

// Attach implements [api.Backend].
func (s *Supervisor) Attach(ctx context.Context, name string) (io.ReadWriteCloser, error) {
	m, c, err := s.dial(ctx, name)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	stdin := m.rec.VM.OpenStdin
	m.mu.Unlock()
	st, err := c.Attach(ctx, proto.AttachRequest{Stdin: stdin})
	return st, m.explain("attach to", err)
}

// CopyIn implements [api.Backend].
func (s *Supervisor) CopyIn(ctx context.Context, name, path string, tar io.Reader) error {
	m, c, err := s.dial(ctx, name)
	if err != nil {
		return err
	}
	if path == "" {
		return invalid("no path in VM %s", m.name)
	}
	return m.explain("copy into", c.CopyIn(ctx, path, tar))
}

// CopyOut implements [api.Backend].
func (s *Supervisor) CopyOut(ctx context.Context, name, path string) (io.ReadCloser, error) {
	m, c, err := s.dial(ctx, name)
	if err != nil {
		return nil, err
	}
	if path == "" {
		return nil, invalid("no path in VM %s", m.name)
	}
	r, err := c.CopyOut(ctx, path)
	return r, m.explain("copy from", err)
}

func (s *Supervisor) dial(ctx context.Context, name string) (*machine, *agent.Client, error) {
	m, err := s.find(name)
	if err != nil {
		return nil, nil, err
	}
	c, err := m.client(ctx)
	if err != nil {
		return nil, nil, explain(err)
	}
	return m, c, nil
}

// explain says what failed and for which VM, unless the guest did so itself.
func (m *machine) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	if errors.As(err, new(*agent.Error)) {
		return explain(err)
	}
	if errors.Is(err, agent.ErrClosed) && !m.live() {
		return wrongState("VM %s has ended", m.name)
	}
	return explain(fmt.Errorf("%s VM %s: %w", what, m.name, err))
}
