//go:build linux

// Package keeper keeps the memory of clones served: it runs the page server
// (uffd_handler) of one snapshot, holds what must not be lost when that dies, and
// replaces it then.
//
// What it holds for each VM is a [pageserver.Guest]: duplicates of the userfaultfd
// and of the VMM's pidfd, and the ledger of what the guest gave back. VMMs shake hands with the
// keeper, not with the page server. When the page server ends, for whatever reason, the threads
// that wait for pages sleep on; the successor gets the template and all guests,
// applies what the ledgers say was left undone, and wakes the sleepers, whose faults
// are delivered anew (userfaultfd(2); DESIGN fact: the lost faults come again).
//
// A page server outlives its keeper, which is part of the supervisor. The next
// keeper gets the descriptors back from it. Only when both die together are the VMs lost:
// nobody can serve them, and they wait, since the VMM itself holds the userfaultfd,
// until the supervisor ends them.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"fcvm/internal/pageserver"
	"fcvm/internal/workingset"
)

// Config says which snapshot is served, and how.
type Config struct {
	// Binary is the path of uffd_handler.
	Binary string `json:"binary"`
	// Dir is where the log goes, Runtime where the sockets. Both exist, and
	// Runtime is short.
	Dir     string `json:"dir"`
	Runtime string `json:"runtime"`
	// MemFile is the snapshot's memory file, Size its size in bytes.
	MemFile string `json:"mem_file"`
	Size    int64  `json:"size"`
	// PageSums and WorkingSet are paths, or empty; see [pageserver.Config].
	PageSums   string            `json:"page_sums,omitempty"`
	WorkingSet string            `json:"working_set,omitempty"`
	ID         workingset.ID     `json:"id"`
	Policy     pageserver.Policy `json:"policy"`
	Fill       pageserver.Fill   `json:"fill"`
	// IdleTimeout ends the page server on its own when for so long neither a clone
	// nor a keeper was there, such as "30s"; empty means never.
	IdleTimeout string `json:"idle_timeout,omitempty"`

	// Inherit are files that page servers keep open, such as leases. The caller
	// closes its own copies. After an Adopt there are none.
	Inherit []*os.File `json:"-"`
	// Replaced is told of each new page server, whose handle is what Adopt needs
	// from then on. It is not called concurrently.
	Replaced func(Handle) `json:"-"`
	// Log is slog.Default() when nil.
	Log *slog.Logger `json:"-"`
}

func (c *Config) control() string { return filepath.Join(c.Runtime, "control.sock") }
func (c *Config) socket() string  { return filepath.Join(c.Runtime, "uffd.sock") }

// Handle is what a restarted supervisor needs to adopt a page server.
type Handle struct {
	PID int `json:"pid"`
	// StartTime in clock ticks since boot, which tells a recycled pid.
	StartTime uint64 `json:"start_time"`
	Config    Config `json:"config"`
}

// askTimeout bounds an answer of a page server, which takes it microseconds.
const askTimeout = 10 * time.Second

// ErrReleased means that the keeper was stopped or released.
var ErrReleased = errors.New("page server was let go")

// Keeper keeps a page server. Its methods may be called concurrently.
type Keeper struct {
	config   Config
	log      *slog.Logger
	template *os.File
	listener *net.UnixListener
	life     context.Context
	end      context.CancelFunc
	work     sync.WaitGroup
	done     chan struct{} // see Done

	reception pageserver.Reception

	// serving is held over handing guests to a page server, and over its replacement.
	serving sync.Mutex

	mu        sync.Mutex
	proc      *process                     // guarded by mu; the page server in use, which may have ended
	guests    map[string]*pageserver.Guest // guarded by mu; by ID
	failures  map[int]string               // guarded by mu; why the keeper ended a VMM
	handovers Handovers                    // guarded by mu
	gaveUp    error                        // guarded by mu
}

// Handovers tells of page servers that were replaced.
type Handovers struct {
	Count int `json:"count"`
	// Last and Longest are the times from noticing that the old one had ended to
	// all guests being served again, in nanoseconds.
	Last    time.Duration `json:"last_ns"`
	Longest time.Duration `json:"longest_ns"`
}

// Start starts a page server, and returns when it answers. When it fails, or ctx
// ends first, nothing is left behind but the log.
func Start(ctx context.Context, c Config) (*Keeper, error) {
	template, err := newTemplate(c.Size)
	if err != nil {
		return nil, err
	}
	p, err := launch(ctx, &c, template, false)
	if err != nil {
		template.Close()
		_ = os.Remove(c.control())
		return nil, err
	}
	return newKeeper(ctx, c, p, template, nil)
}

// Adopt takes over a page server that another process started, and all that it
// serves. The error wraps [fcvm/internal/vmm.ErrGone] when it has ended.
func Adopt(ctx context.Context, h Handle, replaced func(Handle), log *slog.Logger) (_ *Keeper, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("adopt page server: %w", err)
		}
	}()
	p, err := adopt(ctx, h)
	if err != nil {
		return nil, err
	}
	c := h.Config
	c.Replaced, c.Log = replaced, log
	template, err := p.client.Template(ctx)
	if errors.Is(err, pageserver.ErrAnswered) {
		template, err = newTemplate(c.Size) // of policy copy: nobody fills it
	}
	if err != nil {
		p.release()
		return nil, err
	}
	guests, err := p.client.Guests(ctx)
	if err != nil {
		template.Close()
		p.release()
		return nil, err
	}
	return newKeeper(ctx, c, p, template, guests)
}

// newKeeper takes over its arguments, and lets them go where it fails.
func newKeeper(ctx context.Context, c Config, p *process, template *os.File, guests []*pageserver.Guest) (*Keeper, error) {
	k := &Keeper{
		config: c, log: c.Log, template: template, proc: p, done: make(chan struct{}),
		guests: map[string]*pageserver.Guest{}, failures: map[int]string{},
	}
	if k.log == nil {
		k.log = slog.Default()
	}
	k.life, k.end = context.WithCancel(context.WithoutCancel(ctx))
	var err error
	if k.listener, err = pageserver.Listen(ctx, c.socket(), 0o600); err != nil {
		for _, g := range guests {
			g.Close()
		}
		template.Close()
		p.end()
		k.end()
		_ = os.Remove(c.control())
		return nil, err
	}
	for _, g := range guests {
		k.hold(g)
	}
	k.work.Go(k.accept)
	k.work.Go(k.watch)
	return k, nil
}

// accept shakes hands with VMMs until the listener is closed.
func (k *Keeper) accept() {
	for {
		conn, err := k.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, say: no reason to leave the clones that run.
			k.log.Warn("accepting a VMM failed", "error", err)
			select {
			case <-k.life.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		k.work.Go(func() {
			defer conn.Close()
			if err := k.receive(conn); err != nil {
				k.log.Warn("VMM refused", "error", err)
			}
		})
	}
}

// receive takes in a VMM, and has it served.
func (k *Keeper) receive(conn *net.UnixConn) error {
	g, err := k.reception.Receive(k.life, conn, nil)
	if err != nil {
		return err
	}
	if err := g.MakeLedger(k.config.Size); err != nil {
		k.fail(g, err)
		g.Close()
		return err
	}
	k.hold(g)
	k.serving.Lock()
	defer k.serving.Unlock()
	return k.serve(g)
}

// hold keeps a guest until its VMM has ended.
func (k *Keeper) hold(g *pageserver.Guest) {
	k.mu.Lock()
	k.guests[g.ID] = g
	k.mu.Unlock()
	k.work.Go(func() {
		g.Wait()
		k.mu.Lock()
		if k.guests[g.ID] == g {
			delete(k.guests, g.ID)
		}
		k.mu.Unlock()
		g.Close()
	})
}

// serve hands a guest to the page server. Where that has ended, its successor gets
// the guest; where it refuses, the VMM must not run on. The caller holds serving.
func (k *Keeper) serve(g *pageserver.Guest) error {
	k.mu.Lock()
	p := k.proc
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(k.life, askTimeout)
	defer cancel()
	err := p.client.Serve(ctx, g)
	switch {
	case err == nil || k.life.Err() != nil:
		return nil
	case errors.Is(err, pageserver.ErrAnswered):
		k.fail(g, err)
		return err
	default:
		// It has ended, or is of no more use: watch does the rest.
		k.log.Warn("page server does not answer", "pid", p.PID(), "error", err)
		_ = p.Kill()
		return nil
	}
}

// fail ends a VMM that cannot get its memory, and remembers why.
func (k *Keeper) fail(g *pageserver.Guest, reason error) {
	if err := g.Kill(); err != nil {
		reason = errors.Join(reason, err)
	}
	k.log.Error("VMM killed, its memory cannot be served", "pid", g.PID, "error", reason)
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.failures) > 256 {
		clear(k.failures) // who wanted to know has asked
	}
	k.failures[g.PID] = reason.Error()
}

// PID of the page server in use.
func (k *Keeper) PID() int { return k.current().PID() }

func (k *Keeper) current() *process {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.proc
}

// Handle is what [Adopt] needs.
func (k *Keeper) Handle() Handle { return k.handle(k.current()) }

func (k *Keeper) handle(p *process) Handle {
	return Handle{PID: p.PID(), StartTime: p.StartTime(), Config: k.config}
}

// Socket is where VMMs shake hands.
func (k *Keeper) Socket() string { return k.config.socket() }

// Template opens the template for reading. The caller closes it. It is for VMMs,
// with a userfaultfd on the mapping: a read through any other mapping makes the
// kernel fill a hole with zeros, for all clones. read(2) does not.
func (k *Keeper) Template() (*os.File, error) {
	raw, err := k.template.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open template: %w", err)
	}
	var f *os.File
	var openErr error
	err = raw.Control(func(fd uintptr) { f, openErr = os.Open(fdPath(int(fd))) })
	if err = errors.Join(err, openErr); err != nil {
		return nil, fmt.Errorf("open template: %w", err)
	}
	return f, nil
}

// Stats asks the page server. Why a VMM was killed is told even when that was
// before a handover.
func (k *Keeper) Stats(ctx context.Context) (pageserver.Stats, error) {
	return k.current().client.Stats(ctx)
}

// Record tells the page server that the guest of the VMM with this pid begins to run
// just now, or that it waits. What clones ask for is recorded from the first on.
func (k *Keeper) Record(ctx context.Context, pid int, on bool) error {
	return k.current().client.Record(ctx, pid, on)
}

// Failure says why a VMM was killed, by its pid; "" when it was not, as far as is
// known. It asks the page server, for at most a second.
func (k *Keeper) Failure(pid int) string {
	k.mu.Lock()
	reason := k.failures[pid]
	k.mu.Unlock()
	if reason != "" {
		return reason
	}
	ctx, cancel := context.WithTimeout(k.life, time.Second)
	defer cancel()
	if st, err := k.Stats(ctx); err == nil {
		for _, f := range st.Failures {
			if f.PID == pid {
				return f.Reason
			}
		}
	}
	return ""
}

// Handovers tells how often the page server was replaced.
func (k *Keeper) Handovers() Handovers {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.handovers
}

// Done is closed when there is no page server any more and none could be started:
// the guests wait for ever then. Not after Stop or Release.
func (k *Keeper) Done() <-chan struct{} { return k.done }

// Err says why there is none; nil before Done.
func (k *Keeper) Err() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.gaveUp
}

// Stop ends the page server and waits for that; it is killed when ctx ends or it
// does not answer. VMs that still run wait at their next fault for ever.
func (k *Keeper) Stop(ctx context.Context) error {
	p := k.letGo()
	err := p.client.Shutdown(ctx)
	if err == nil {
		err = p.Wait(ctx)
	}
	if err != nil {
		if err := p.Kill(); err != nil {
			return fmt.Errorf("stop page server: %w", err)
		}
		<-p.Done()
	}
	p.release()
	_ = os.Remove(k.config.control())
	return nil
}

// Release lets go of the page server, which runs on. It is idempotent.
func (k *Keeper) Release() {
	// The socket's path stays: whoever connects is refused, until the next keeper.
	k.listener.SetUnlinkOnClose(false)
	k.letGo().release()
}

// letGo ends the keeping. It returns the page server.
func (k *Keeper) letGo() *process {
	k.end()
	k.listener.Close()
	k.mu.Lock()
	guests := k.guests
	k.guests = map[string]*pageserver.Guest{}
	k.mu.Unlock()
	for _, g := range guests {
		g.Close()
	}
	k.work.Wait()
	k.template.Close()
	return k.current()
}
