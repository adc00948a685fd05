package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/guest/agent"
)

// defaultStopSignal is docker's.
const defaultStopSignal = "TERM"

// killGrace is how long a guest has to end after its container's process was
// killed, before the VM is.
const killGrace = 2 * time.Second

// Stop implements [api.Backend].
func (s *Supervisor) Stop(ctx context.Context, name string, timeout time.Duration) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	return explain(m.stop(ctx, timeout))
}

func (m *machine) stop(ctx context.Context, timeout time.Duration) error {
	if !m.live() {
		return nil
	}
	_, state, err := m.running()
	if state == api.StateCreating {
		m.cancel(wrongState("VM %s was stopped while it started", m.name))
		return m.waitExit(ctx)
	}
	if err != nil { // it ended this moment
		return m.waitExit(ctx)
	}
	if state == api.StatePaused {
		// A paused process cannot listen to a signal.
		if err := m.resume(ctx); err != nil {
			return err
		}
	}
	m.mu.Lock()
	signal := m.rec.Container.StopSignal
	m.mu.Unlock()
	if signal == "" {
		signal = defaultStopSignal
	}
	deadline, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err = m.signal(deadline, signal)
	if err == nil {
		err = m.waitExit(deadline)
	}
	if !m.live() {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		m.s.log.Warn("stop signal not delivered", "vm", m.name, "signal", signal, "error", err)
	}
	return m.killHard(ctx)
}

// killHard kills the container's process, so that the guest can still tell what
// became of it, and then the VM. It returns when the VM has ended.
func (m *machine) killHard(ctx context.Context) error {
	grace, cancel := context.WithTimeout(ctx, killGrace)
	defer cancel()
	if m.signal(grace, "KILL") == nil && m.waitExit(grace) == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := m.kill(""); err != nil && m.live() {
		return err
	}
	return m.waitExit(ctx)
}

// waitExit waits until the end of the VM is on record.
func (m *machine) waitExit(ctx context.Context) error {
	select {
	case <-m.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *machine) signal(ctx context.Context, name string) error {
	c, err := m.client(ctx)
	if err != nil {
		return err
	}
	err = c.Signal(ctx, name)
	if errors.Is(err, agent.ErrClosed) {
		// A process that the signal ends takes the VM with it, perhaps before the
		// answer is through.
		grace, cancel := context.WithTimeout(ctx, killGrace)
		defer cancel()
		if m.waitExit(grace) == nil {
			return nil
		}
	}
	if e := (*agent.Error)(nil); errors.As(err, &e) {
		return invalid("send signal %s to VM %s: %s", name, m.name, e.Message)
	}
	if err != nil {
		return fmt.Errorf("send signal %s to VM %s: %w", name, m.name, err)
	}
	return nil
}

// Kill implements [api.Backend].
func (s *Supervisor) Kill(ctx context.Context, name, signal string) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	signal, err = parseSignal(signal)
	if err != nil {
		return err
	}
	_, state, err := m.running()
	switch {
	case state == api.StateCreating && signal == "KILL":
		return explain(m.stop(ctx, 0))
	case err != nil:
		return err
	case signal != "KILL":
		return explain(m.signal(ctx, signal))
	case state == api.StatePaused:
		if err := m.kill(""); err != nil {
			return explain(err)
		}
		return explain(m.waitExit(ctx))
	}
	return explain(m.killHard(ctx))
}

// parseSignal returns a signal's name without SIG, from a name or a number.
func parseSignal(s string) (string, error) {
	if s == "" {
		return "KILL", nil
	}
	if n, err := strconv.Atoi(s); err == nil {
		if name := unix.SignalName(unix.Signal(n)); name != "" {
			return strings.TrimPrefix(name, "SIG"), nil
		}
		if n < 1 || n > 64 {
			return "", invalid("no such signal: %s", s)
		}
		return s, nil // a real-time signal
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if unix.SignalNum("SIG"+name) == 0 && !strings.HasPrefix(name, "RTMIN") && !strings.HasPrefix(name, "RTMAX") {
		return "", invalid("no such signal: %s", s)
	}
	return name, nil
}

// Remove implements [api.Backend].
func (s *Supervisor) Remove(ctx context.Context, name string, force bool) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	if m.live() {
		if !force {
			return &api.Error{
				Code:    api.CodeConflict,
				Message: fmt.Sprintf("VM %s is %s", m.name, m.view().State),
				Hint:    fmt.Sprintf("`fcvm stop %s` first, or `fcvm rm -f %s`", m.name, m.name),
			}
		}
		m.cancel(wrongState("VM %s was removed while it started", m.name))
		if err := m.kill(""); err != nil && m.live() {
			return explain(err)
		}
		if err := m.waitExit(ctx); err != nil {
			return explain(err)
		}
	}
	return explain(m.erase())
}

// Wait implements [api.Backend].
func (s *Supervisor) Wait(ctx context.Context, name string) (api.VM, error) {
	m, err := s.find(name)
	if err != nil {
		return api.VM{}, err
	}
	release := m.hold()
	defer release()
	if err := m.waitExit(ctx); err != nil {
		return api.VM{}, explain(err)
	}
	vm := m.view()
	if vm.AutoRemove {
		// Before the answer: who got the exit code may look whether it is gone.
		if err := m.erase(); err != nil {
			s.log.Error("removing a VM failed", "vm", m.name, "error", err)
		}
	}
	return vm, nil
}

// Pause implements [api.Backend].
func (s *Supervisor) Pause(ctx context.Context, name string) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	return explain(m.pause(ctx))
}

func (m *machine) pause(ctx context.Context) error {
	if err := lock(ctx, m.op); err != nil {
		return err
	}
	defer unlock(m.op)
	vm, state, err := m.running()
	if err != nil {
		return err
	}
	if state == api.StatePaused {
		return wrongState("VM %s is paused already", m.name)
	}
	// With the link at rest, a snapshot of the paused VM is as good as one of a
	// running VM.
	if err := m.quiesce(ctx); err != nil {
		return err
	}
	err = vm.Pause(ctx)
	if err == nil {
		err = m.update(func(r *record) { r.VM.State = api.StatePaused })
	}
	if err != nil {
		m.goOn(vm)
		return fmt.Errorf("pause VM %s: %w", m.name, err)
	}
	return nil
}

// Resume implements [api.Backend].
func (s *Supervisor) Resume(ctx context.Context, name string) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	if _, state, err := m.running(); err != nil {
		return err
	} else if state != api.StatePaused {
		return wrongState("VM %s is not paused", m.name)
	}
	return explain(m.resume(ctx))
}

func (m *machine) resume(ctx context.Context) error {
	if err := lock(ctx, m.op); err != nil {
		return err
	}
	defer unlock(m.op)
	vm, state, err := m.running()
	if err != nil {
		return err
	}
	if state != api.StatePaused {
		return nil
	}
	if err := vm.Resume(ctx); err != nil {
		return fmt.Errorf("resume VM %s: %w", m.name, err)
	}
	if err := m.update(func(r *record) { r.VM.State = api.StateRunning }); err != nil {
		return err
	}
	m.unquiesce()
	m.catchUp()
	return nil
}

// quiesce brings the link to the agent to rest.
func (m *machine) quiesce(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, agentTimeout, errNoAnswer{agentTimeout})
	defer cancel()
	c, err := m.client(ctx)
	if err != nil {
		return err
	}
	if err := c.Quiesce(ctx); err != nil {
		m.unquiesce()
		return because(ctx, fmt.Errorf("bring the agent of VM %s to rest: %w", m.name, err))
	}
	return nil
}

// unquiesce lets the link go on; a link that cannot is replaced by the next
// request's.
func (m *machine) unquiesce() {
	m.mu.Lock()
	c := m.agent
	m.mu.Unlock()
	if c == nil {
		return
	}
	ctx, cancel := context.WithTimeout(m.s.life, agentTimeout)
	defer cancel()
	if err := c.Unquiesce(ctx); err != nil {
		m.s.log.Warn("the connection to the agent did not go on and is made anew", "vm", m.name, "error", err)
		_ = c.Close()
	}
}

// goOn resumes a VM after something failed, whatever became of the request.
func (m *machine) goOn(vm interface{ Resume(context.Context) error }) {
	ctx, cancel := context.WithTimeout(m.s.life, agentTimeout)
	defer cancel()
	if err := vm.Resume(ctx); err != nil {
		m.s.log.Error("VM could not be resumed", "vm", m.name, "error", err)
	}
	m.unquiesce()
}
