// Package supervisor owns the VMs of one data directory: it starts them, knows
// what becomes of them, and answers the API.
//
// VMs and page servers outlive it. All that a successor needs lies in one state
// file per VM, written before and after each step; a supervisor that is killed
// at any moment loses nothing but the requests that it was answering. What it
// was still starting then is ended by its successor.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"fcvm/internal/api"
	"fcvm/internal/datadir"
	"fcvm/internal/guest"
	"fcvm/internal/network"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
)

// Options of a supervisor. Only Layout is required.
type Options struct {
	Layout *datadir.Layout
	// Version of fcvm, for the version endpoint.
	Version string
	// OnDemand ends the supervisor some time after its last VM and client.
	OnDemand bool
	// IdleTimeout is that time; 0 means 10 s.
	IdleTimeout time.Duration
	// Metrics is an address on the loopback where Prometheus may ask by TCP, such as
	// "127.0.0.1:9464"; empty for none. The API's socket has them always.
	Metrics string
	// Spares is the number of VMMs that are started ahead for each kind of clone of
	// which one lives; 0 means none.
	Spares int
	// Log is slog.Default() when nil.
	Log *slog.Logger

	// Engines as [vmm.Choose] takes them; nil means those of this build.
	Engines []vmm.Named
	// PageServers, Images and Guest are those of this build when nil.
	PageServers PageServers
	Images      Images
	Guest       func() (*guest.Assets, error)
}

const (
	defaultIdle = 10 * time.Second
	defaultBoot = 120 * time.Second
	// agentTimeout bounds a guest's answer to what takes it milliseconds. TCG on
	// a busy host is slow.
	agentTimeout = 30 * time.Second
	// adoptAtOnce bounds the VMs that are adopted at the same time.
	adoptAtOnce = 8
)

// Supervisor implements [api.Backend].
type Supervisor struct {
	o         Options
	log       *slog.Logger
	snapshots *snapshot.Store
	claims    network.Claims
	servers   servers
	spares    spares

	// life ends with the supervisor; what runs in the background watches it and
	// is counted in work.
	life context.Context
	work sync.WaitGroup

	mu    sync.Mutex
	byID  map[string]*machine // guarded by mu
	names map[string]*machine // guarded by mu

	// activity gets a word when a VM or a client came or went.
	activity chan struct{}
	connsMu  sync.Mutex
	conns    int // open connections; guarded by connsMu
}

var _ api.Backend = (*Supervisor)(nil)

// Run serves a data directory until ctx ends or, on demand, until nobody needs
// it. VMs run on. Only one supervisor runs for a data directory: a second Run
// fails with an error that names the first one's pid.
func Run(ctx context.Context, o Options) error {
	lock, err := acquire(ctx, o.Layout)
	if err != nil {
		return err
	}
	defer leave(lock, o.Layout)

	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	s, err := newSupervisor(life, o)
	if err != nil {
		return err
	}
	if err := s.adoptAll(ctx); err != nil {
		end()
		s.letGo()
		return err
	}
	if err := s.serveMetrics(ctx); err != nil {
		end()
		s.letGo()
		return err
	}
	l, err := listen(o.Layout)
	if err != nil {
		end()
		s.letGo()
		return err
	}
	server := api.NewServer(s, s.log)
	server.OnConns(s.countConns)
	serving, stop := context.WithCancel(ctx)
	defer stop()
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		if o.OnDemand {
			s.waitIdle(serving)
			stop()
		}
	}()
	s.log.Info("serving", "socket", o.Layout.Socket(), "pid", os.Getpid(), "version", o.Version, "vms", len(s.machines()))
	if err := notifyReady(); err != nil {
		s.log.Warn("telling the starter failed", "error", err)
	}
	err = server.Serve(serving, l)
	stop()
	<-idle
	end()
	if n := s.letGo(); n > 0 {
		s.log.Info("stopped; VMs run on, and the next command finds them again", "vms", n)
	} else {
		s.log.Info("stopped")
	}
	return err
}

func newSupervisor(life context.Context, o Options) (*Supervisor, error) {
	if o.IdleTimeout == 0 {
		o.IdleTimeout = defaultIdle
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if err := fillIn(&o); err != nil {
		return nil, err
	}
	snaps, err := snapshot.Open(o.Layout.Snapshots())
	if err != nil {
		return nil, err
	}
	s := &Supervisor{
		o: o, log: o.Log, snapshots: snaps, life: life,
		byID: map[string]*machine{}, names: map[string]*machine{},
		activity: make(chan struct{}, 1),
	}
	s.servers.init(s)
	s.spares.init(s, o.Spares)
	return s, nil
}

// letGo waits for the background work, lets go of all VMs and returns how many
// run on.
func (s *Supervisor) letGo() int {
	s.spares.close()
	s.work.Wait()
	n := 0
	for _, m := range s.machines() {
		if m.release() {
			n++
		}
	}
	s.servers.release()
	return n
}

// spawn runs f in the background; letGo waits for it. f has to end with s.life.
func (s *Supervisor) spawn(f func()) {
	s.work.Add(1)
	go func() {
		defer s.work.Done()
		f()
	}()
}

// listen makes the API's socket, for this user alone.
func listen(l *datadir.Layout) (net.Listener, error) {
	// A socket that is there was left by one that was killed: we hold the lock.
	if err := os.Remove(l.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		return nil, fmt.Errorf("listen for the API: %w", err)
	}
	if err := os.Chmod(l.Socket(), 0o600); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("listen for the API: %w", err)
	}
	return ln, nil
}

func (s *Supervisor) countConns(n int) {
	s.connsMu.Lock()
	s.conns = n
	s.connsMu.Unlock()
	s.stir()
}

// stir makes waitIdle look again.
func (s *Supervisor) stir() {
	select {
	case s.activity <- struct{}{}:
	default:
	}
}

func (s *Supervisor) busy() bool {
	s.connsMu.Lock()
	conns := s.conns
	s.connsMu.Unlock()
	if conns > 0 {
		return true
	}
	for _, m := range s.machines() {
		if m.live() {
			return true
		}
	}
	return false
}

// waitIdle returns when there was neither a VM nor a client for IdleTimeout, or
// when ctx ends.
func (s *Supervisor) waitIdle(ctx context.Context) {
	timer := time.NewTimer(s.o.IdleTimeout)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.activity:
			// Every change begins a new wait, or ends the one that runs.
			timer.Reset(s.o.IdleTimeout)
		case <-timer.C:
			if !s.busy() {
				s.log.Info("idle", "for", s.o.IdleTimeout)
				return
			}
			// The change that ends this is announced.
		}
	}
}

// Info implements [api.Backend].
func (s *Supervisor) Info(context.Context) api.ServerInfo {
	n := 0
	for _, m := range s.machines() {
		if m.live() {
			n++
		}
	}
	return api.ServerInfo{Version: s.o.Version, PID: os.Getpid(), VMs: n}
}

// adoptAll takes over what an earlier supervisor left.
func (s *Supervisor) adoptAll(ctx context.Context) error {
	entries, err := os.ReadDir(s.o.Layout.VMs())
	if err != nil {
		return fmt.Errorf("find VMs: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(adoptAtOnce)
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		g.Go(func() error {
			if err := s.adopt(ctx, e.Name()); err != nil {
				// One that cannot be read must not keep the others from being served.
				s.log.Error("adopting a VM failed", "id", e.Name(), "error", err)
			}
			return ctx.Err()
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	s.sweep()
	return nil
}
