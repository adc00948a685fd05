package guesttest

import (
	"context"
	"sync"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/guestd"
	"fcvm/internal/guest/link"
	"fcvm/internal/guest/proto"
)

// Guest is an agent whose processes run on the host.
type Guest struct {
	Port   *Port
	Server *guestd.Server
	System *System
	// Etc is where the agent has its files.
	Etc string

	logMu sync.Mutex
	log   []byte // guarded by logMu
}

// Start starts a Guest that ends with the test.
func Start(t testing.TB) *Guest {
	t.Helper()
	g := &Guest{Port: NewPort(), System: &System{}, Etc: t.TempDir()}
	g.Server = guestd.New(guestd.Config{
		System: g.System, Children: waiter{}, Etc: g.Etc, Log: logWriter{g},
		Address: "10.0.2.15", Nameserver: "10.0.2.3", Version: "test",
	})
	l := link.NewGuest(g.Port, g.Server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.Serve() // ends with the port
	}()
	t.Cleanup(func() {
		g.Port.Close()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Error("the agent did not end with its port")
		}
	})
	return g
}

// Connect connects a client that ends with the test.
func (g *Guest) Connect(t testing.TB) *agent.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := agent.Connect(ctx, g.Port.Dial())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Log returns what was written to the log port so far.
func (g *Guest) Log() []byte {
	g.logMu.Lock()
	defer g.logMu.Unlock()
	return append([]byte(nil), g.log...)
}

type logWriter struct{ g *Guest }

func (w logWriter) Write(b []byte) (int, error) {
	w.g.logMu.Lock()
	defer w.g.logMu.Unlock()
	w.g.log = append(w.g.log, b...)
	return len(b), nil
}

// System records what the agent wanted of its machine.
type System struct {
	mu    sync.Mutex
	calls []string       // guarded by mu
	id    proto.Identity // guarded by mu
}

// Calls returns the names of the calls, in their order.
func (s *System) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.calls...)
}

// Identity returns what was last set.
func (s *System) Identity() proto.Identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id
}

func (s *System) note(call string, set func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, call)
	set()
	return nil
}

// SetHostname implements guestd.System.
func (s *System) SetHostname(name string) error {
	return s.note("hostname", func() { s.id.Hostname = name })
}

// SetClock implements guestd.System.
func (s *System) SetClock(t time.Time) error {
	return s.note("clock", func() { s.id.Wall = t })
}

// AddEntropy implements guestd.System.
func (s *System) AddEntropy(seed []byte) error {
	return s.note("entropy", func() { s.id.Entropy = append([]byte(nil), seed...) })
}

// KillAll implements guestd.System; the test's processes are not its own.
func (s *System) KillAll() { _ = s.note("kill", func() {}) }

// waiter implements guestd.Children for a process that has other children.
type waiter struct{}

func (waiter) Start(start func() (int, error)) (int, <-chan syscall.WaitStatus, error) {
	pid, err := start()
	if err != nil {
		return 0, nil, err
	}
	c := make(chan syscall.WaitStatus, 1)
	go func() { // ends with the process
		var ws syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &ws, 0, nil); err != syscall.EINTR {
				break
			}
		}
		c <- ws
	}()
	return pid, c, nil
}
