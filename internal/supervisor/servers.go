package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
)

// stopServerTimeout bounds the end of a page server that nobody needs.
const stopServerTimeout = 5 * time.Second

// serverPrefix begins the names of page servers' directories.
const serverPrefix = "ps-"

// serverKey tells page servers apart. Sum is that of the snapshot's manifest: a
// name may come back with another memory.
type serverKey struct {
	Snapshot string `json:"snapshot"`
	Sum      string `json:"sum"`
	Policy   string `json:"policy"`
	// NoReplay is of one that neither replays the working set nor records it.
	NoReplay bool `json:"no_replay,omitempty"`
}

func (o *origin) serverKey() serverKey {
	return serverKey{Snapshot: o.snap.Name, Sum: o.snap.Sum, Policy: o.req.Policy, NoReplay: o.req.NoReplay}
}

// server is a page server in use.
type server struct {
	key serverKey
	// started is closed when proc or err is there.
	started chan struct{}
	proc    PageServer
	handle  json.RawMessage // guarded by servers.mu
	err     error
	runtime string

	users map[user]bool // guarded by servers.mu
	// upgrading is held (one slot) by who looks for another program; said is what it
	// complained of last.
	upgrading chan struct{}
	said      string
}

func newServer(key serverKey) *server {
	return &server{key: key, started: make(chan struct{}), users: map[user]bool{}, upgrading: make(chan struct{}, 1)}
}

// user has a VMM whose memory a page server serves.
type user interface {
	// serverEnded ends the VMM: it would wait for its memory for ever.
	serverEnded(reason string)
	// serverReplaced puts on record that another process serves it.
	serverReplaced(p *server)
}

// failure says why the page server gave up on the VMM with this pid, or "".
func (p *server) failure(pid int) string {
	select {
	case <-p.proc.Done():
		return fmt.Sprintf("the page server ended: %v", p.proc.Err())
	default:
	}
	return p.proc.Failure(pid)
}

// servers holds the page servers: one per snapshot and policy in use, from its
// first clone's start to its last one's end.
type servers struct {
	s     *Supervisor
	mu    sync.Mutex
	byKey map[serverKey]*server // guarded by mu
}

func (t *servers) init(s *Supervisor) {
	t.s = s
	t.byKey = map[serverKey]*server{}
}

// get returns the page server for u, and starts one where there is none. Who
// comes second waits for the first one's start. Without an error, u has to drop it.
func (t *servers) get(ctx context.Context, u user, key serverKey, snap *snapshot.Snapshot, lease *os.File) (*server, error) {
	for {
		t.mu.Lock()
		p := t.byKey[key]
		first := p == nil
		if first {
			p = newServer(key)
			t.byKey[key] = p
		}
		p.users[u] = true
		t.mu.Unlock()
		if first {
			t.start(ctx, p, snap, lease)
		}
		select {
		case <-p.started:
		case <-ctx.Done():
			t.drop(p, u)
			return nil, context.Cause(ctx)
		}
		if p.err == nil {
			if !first {
				t.upgrade(p)
			}
			return p, nil
		}
		t.drop(p, u)
		// The one that was starting it may have been called off; this one was not.
		if first || !errors.Is(p.err, context.Canceled) {
			return nil, p.err
		}
	}
}

func (t *servers) start(ctx context.Context, p *server, snap *snapshot.Snapshot, lease *os.File) {
	defer close(p.started)
	p.err = func() error {
		dir := filepath.Join(t.s.o.Layout.Runtime, serverPrefix+randomHex(4))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("make page server's directory: %w", err)
		}
		p.runtime = dir
		id, err := snap.WorkingSetID()
		if err != nil {
			return err
		}
		workingSet := snap.WorkingSet()
		if p.key.NoReplay {
			workingSet = ""
		}
		proc, err := t.s.o.PageServers.Launch(ctx, PageServerConfig{
			Dir: dir, Runtime: dir, Memory: snap.Memory(), Size: snap.Machine.MemoryBytes, PageSums: snap.PageSums(),
			WorkingSet: workingSet, ID: id, Policy: p.key.Policy,
			// Under KVM a read that has to wait arrives as a write, so that only what
			// is there beforehand is shared. Elsewhere it would only cost memory.
			Fill:    snap.Engine.Accel == "kvm",
			Inherit: []*os.File{lease}, Replaced: func(h json.RawMessage) { t.replaced(p, h) },
		})
		if err != nil {
			_ = os.RemoveAll(dir)
			return fmt.Errorf("start page server of snapshot %s: %w", p.key.Snapshot, err)
		}
		handle, err := proc.Handle()
		if err != nil {
			t.stop(proc)
			_ = os.RemoveAll(dir)
			return err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		p.proc, p.handle = proc, handle
		return nil
	}()
	if p.err != nil {
		t.mu.Lock()
		delete(t.byKey, p.key)
		t.mu.Unlock()
		return
	}
	t.s.log.Info("page server runs", "snapshot", p.key.Snapshot, "policy", p.key.Policy, "pid", p.proc.PID())
	t.s.spawn(func() { t.watch(p) })
}

// replaced puts on record that another process serves p's clones.
func (t *servers) replaced(p *server, handle json.RawMessage) {
	t.mu.Lock()
	p.handle = handle
	users := slices.Collect(maps.Keys(p.users))
	t.mu.Unlock()
	for _, u := range users {
		u.serverReplaced(p)
	}
}

// serverReplaced implements [user].
func (m *machine) serverReplaced(p *server) {
	err := m.update(func(r *record) {
		if r.PageServer != nil {
			r.PageServer = m.s.servers.record(p)
		}
	})
	if err != nil && !errors.Is(err, vmm.ErrGone) {
		m.s.log.Error("a page server's successor is not on record", "vm", m.name, "error", err)
	}
}

// record is how a later supervisor finds p.
func (t *servers) record(p *server) *pageServerRecord {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &pageServerRecord{Key: p.key, Handle: p.handle}
}

// adopt joins m with the page server that it already has.
func (t *servers) adopt(ctx context.Context, m *machine, rec *pageServerRecord) error {
	t.mu.Lock()
	p := t.byKey[rec.Key]
	first := p == nil
	if first {
		p = newServer(rec.Key)
		p.handle = rec.Handle
		t.byKey[rec.Key] = p
	}
	p.users[m] = true
	t.mu.Unlock()
	if first {
		p.proc, p.err = t.s.o.PageServers.Adopt(ctx, rec.Handle, func(h json.RawMessage) { t.replaced(p, h) })
		if p.err == nil {
			p.runtime = filepath.Dir(p.proc.Socket())
			t.s.spawn(func() { t.watch(p) })
			t.upgrade(p)
		} else {
			t.mu.Lock()
			delete(t.byKey, p.key)
			t.mu.Unlock()
		}
		close(p.started)
	}
	<-p.started
	if p.err != nil {
		return p.err
	}
	m.mu.Lock()
	m.server = p
	m.mu.Unlock()
	return nil
}

// upgradeTimeout bounds the replacement of a page server, which takes milliseconds.
const upgradeTimeout = 30 * time.Second

// upgrade has p, in the background, replaced by the program that is installed now,
// where that is another one. Clones notice a pause.
func (t *servers) upgrade(p *server) {
	select {
	case p.upgrading <- struct{}{}:
	default:
		return
	}
	t.s.spawn(func() {
		defer func() { <-p.upgrading }()
		ctx, cancel := context.WithTimeout(t.s.life, upgradeTimeout)
		defer cancel()
		done, err := p.proc.Upgrade(ctx)
		switch {
		case err == nil && done:
			t.s.log.Info("page server upgraded", "snapshot", p.key.Snapshot, "policy", p.key.Policy, "pid", p.proc.PID())
		case err != nil && ctx.Err() == nil && err.Error() != p.said:
			p.said = err.Error()
			t.s.log.Warn("page server not upgraded", "snapshot", p.key.Snapshot, "policy", p.key.Policy, "error", err)
		}
	})
}

// watch ends the VMs of a page server that ended: they would wait for their
// memory for ever.
func (t *servers) watch(p *server) {
	select {
	case <-p.proc.Done():
	case <-t.s.life.Done():
		return
	}
	t.mu.Lock()
	if t.byKey[p.key] == p {
		delete(t.byKey, p.key)
	}
	users := slices.Collect(maps.Keys(p.users))
	t.mu.Unlock()
	if len(users) == 0 {
		return
	}
	reason := fmt.Sprintf("the page server that serves its memory ended: %v", p.proc.Err())
	t.s.log.Error("page server ended", "snapshot", p.key.Snapshot, "policy", p.key.Policy, "error", p.proc.Err(), "vms", len(users))
	for _, u := range users {
		u.serverEnded(reason)
	}
	_ = os.RemoveAll(p.runtime)
}

// serverEnded implements [user].
func (m *machine) serverEnded(reason string) {
	m.cancel(errors.New(reason))
	if err := m.kill(reason); err != nil {
		m.s.log.Error("ending a VM failed", "vm", m.name, "error", err)
	}
}

// pass makes what from used of a page server to's. A nil server is none.
func (t *servers) pass(p *server, from, to user) {
	if p == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(p.users, from)
	p.users[to] = true
}

// letServerGo gives up the VM's share in its page server, and ends that with the
// last one.
func (m *machine) letServerGo() {
	m.mu.Lock()
	p := m.server
	m.server = nil
	m.mu.Unlock()
	m.s.servers.drop(p, m)
}

// drop ends u's use of a page server, and that with its last user. A nil server is
// none.
func (t *servers) drop(p *server, u user) {
	if p == nil {
		return
	}
	t.mu.Lock()
	delete(p.users, u)
	last := len(p.users) == 0
	if last && t.byKey[p.key] == p {
		// From here on nobody finds it; a new clone starts another.
		delete(t.byKey, p.key)
	}
	t.mu.Unlock()
	if !last {
		return
	}
	<-p.started
	if p.err != nil {
		return
	}
	t.stop(p.proc)
	if err := os.RemoveAll(p.runtime); err != nil {
		t.s.log.Warn("removing a page server's sockets failed", "error", err)
	}
	t.s.log.Info("page server stopped", "snapshot", p.key.Snapshot, "policy", p.key.Policy)
}

func (t *servers) stop(proc PageServer) {
	ctx, cancel := context.WithTimeout(context.Background(), stopServerTimeout)
	defer cancel()
	if err := proc.Stop(ctx); err != nil {
		t.s.log.Error("stopping a page server failed", "pid", proc.PID(), "error", err)
	}
}

// list returns the page servers that run.
func (t *servers) list() []*server {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*server
	for _, p := range t.byKey {
		select {
		case <-p.started:
			if p.err == nil {
				all = append(all, p)
			}
		default:
		}
	}
	return all
}

// release lets go of all page servers; they run on.
func (t *servers) release() {
	for _, p := range t.list() {
		p.proc.Release()
	}
}
