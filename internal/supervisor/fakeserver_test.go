package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"fcvm/internal/pageserver"
	"fcvm/internal/vmm"
)

// fakeServers are page servers that serve nothing: their template is the memory
// file itself.
type fakeServers struct {
	mu       sync.Mutex
	procs    map[string]*fakeServer // by handle; guarded by mu
	launched int                    // guarded by mu
	fail     error                  // guarded by mu
}

func newFakeServers() *fakeServers { return &fakeServers{procs: map[string]*fakeServer{}} }

func (f *fakeServers) Launch(ctx context.Context, c PageServerConfig) (PageServer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f.launched++
	p := &fakeServer{all: f, id: fmt.Sprint(f.launched), config: c, done: make(chan struct{})}
	if err := os.WriteFile(p.Socket(), nil, 0o600); err != nil {
		return nil, err
	}
	f.procs[p.id] = p
	return p, nil
}

type fakeServer struct {
	all    *fakeServers
	id     string
	config PageServerConfig
	done   chan struct{}

	recorded []bool // guarded by all.mu
	upgrades int    // guarded by all.mu: how often it was asked for
}

func (p *fakeServer) PID() int                    { return os.Getpid() }
func (p *fakeServer) Socket() string              { return filepath.Join(p.config.Runtime, "uffd.sock") }
func (p *fakeServer) Template() (*os.File, error) { return os.Open(p.config.Memory) }
func (p *fakeServer) Err() error                  { return errors.New("it was killed by the test") }
func (p *fakeServer) Stats(context.Context) (PageServerStats, error) {
	return PageServerStats{Stats: pageserver.Stats{TemplateBytes: 4096, Faults: 7}, RSSBytes: 1 << 20}, nil
}
func (p *fakeServer) Failure(int) string { return "" }

func (p *fakeServer) Record(_ context.Context, _ int, on bool) error {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	p.recorded = append(p.recorded, on)
	return nil
}

func (p *fakeServer) Upgrade(context.Context) (bool, error) {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	p.upgrades++
	return true, nil
}

func (p *fakeServer) Stop(context.Context) error {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	if p.all.procs[p.id] == p {
		delete(p.all.procs, p.id)
		close(p.done)
	}
	return nil
}

func (f *fakeServers) Adopt(_ context.Context, h json.RawMessage, _ func(json.RawMessage)) (PageServer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var id string
	if err := json.Unmarshal(h, &id); err != nil {
		return nil, err
	}
	if p := f.procs[id]; p != nil {
		return p, nil
	}
	return nil, vmm.ErrGone
}

func (f *fakeServers) running() []*fakeServer {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*fakeServer
	for _, p := range f.procs {
		all = append(all, p)
	}
	return all
}

func (p *fakeServer) Handle() (json.RawMessage, error) { return json.Marshal(p.id) }

func (p *fakeServer) Done() <-chan struct{} { return p.done }

func (p *fakeServer) Release() {}
