//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/workingset"
)

// server is what answers the faults of clones.
type server interface {
	// shape of the clones' memory, and what they map; nil for anonymous memory.
	shape() pstest.Shape
	template() *os.File
	// handshake is the socket for it; "" when the kernel alone serves.
	handshake() string
	// pid of the process that answers; 0 for the kernel.
	pid() int
	// faults that were answered since the start, as far as they are counted.
	faults(ctx context.Context) (uint64, error)
	// settle waits until what is done ahead of faults is done.
	settle(ctx context.Context) error
	stop() error
}

// kernel serves without anybody's help: (a).
type kernel struct{ full *os.File }

func (kernel) shape() pstest.Shape                    { return pstest.Plain }
func (k kernel) template() *os.File                   { return k.full }
func (kernel) handshake() string                      { return "" }
func (kernel) pid() int                               { return 0 }
func (kernel) faults(context.Context) (uint64, error) { return 0, nil }
func (kernel) settle(context.Context) error           { return nil }
func (kernel) stop() error                            { return nil }

// handler is uffd_handler, as fcvm runs it.
type handler struct {
	*keeper.Keeper
	policy pageserver.Policy
	dir    string
	mapped *os.File
}

// startHandler starts one for a memory file. The working set at set is replayed and
// recorded to, unless that is "".
func startHandler(ctx context.Context, binary, dir string, policy pageserver.Policy, m *memory, set string) (*handler, error) {
	dir, err := os.MkdirTemp(dir, "ps")
	if err != nil {
		return nil, err
	}
	h := &handler{policy: policy, dir: dir}
	h.Keeper, err = keeper.Start(ctx, keeper.Config{
		Binary: binary, Dir: dir, Runtime: dir, MemFile: m.path, Size: m.size(), Policy: policy,
		WorkingSet: set, ID: workingset.ID{1},
		Replaced: func(keeper.Handle) {}, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err == nil {
		h.mapped, err = h.Template()
	}
	if err != nil {
		return nil, errors.Join(err, h.stop())
	}
	return h, nil
}

func (h *handler) shape() pstest.Shape {
	if h.policy == pageserver.PolicyCopy {
		return pstest.Anonymous
	}
	return pstest.Template
}

func (h *handler) template() *os.File { return h.mapped }
func (h *handler) handshake() string  { return h.Socket() }
func (h *handler) pid() int           { return h.PID() }

func (h *handler) faults(ctx context.Context) (uint64, error) {
	st, err := h.Stats(ctx)
	return st.Faults, err
}

// settle returns when nothing was replayed for a while.
func (h *handler) settle(ctx context.Context) error {
	const quiet = 20 * time.Millisecond
	last, since := ^uint64(0), time.Now()
	for time.Since(since) < quiet {
		st, err := h.Stats(ctx)
		if err != nil {
			return err
		}
		if st.Replay.Count != last {
			last, since = st.Replay.Count, time.Now()
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// ahead is how long it took so far to do things before they were asked for.
func (h *handler) ahead(ctx context.Context) (time.Duration, error) {
	st, err := h.Stats(ctx)
	return time.Duration(st.Replay.SumNanos), err
}

func (h *handler) stop() (err error) {
	if h.mapped != nil {
		h.mapped.Close()
	}
	if h.Keeper != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		err = h.Stop(ctx)
	}
	if said := h.said(); err != nil && said != "" {
		err = fmt.Errorf("%w; uffd_handler said: %s", err, said)
	}
	return errors.Join(err, os.RemoveAll(h.dir))
}

// said is what it logged that was not meant to be.
func (h *handler) said() string {
	log, _ := os.ReadFile(filepath.Join(h.dir, keeper.LogName))
	var bad []string
	for line := range strings.Lines(string(log)) {
		if !strings.Contains(line, " level=INFO ") {
			bad = append(bad, strings.TrimSpace(line))
		}
	}
	return strings.Join(bad, "; ")
}

// serve runs use with a page server and n clones that it serves, and ends them.
func (b *bench) serve(ctx context.Context, policy pageserver.Policy, m *memory, n int, use func(*handler, clones) error) (err error) {
	h, err := startHandler(ctx, b.handler, b.dir, policy, m, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.stop()) }()
	c, err := b.startClones(ctx, h, m, n, 1)
	if err != nil {
		return err
	}
	defer c.end()
	return use(h, c)
}

// workingSet returns the path of a copy of the order's working set, which a first
// clone with policy copy leaves behind.
func (b *bench) workingSet(ctx context.Context, o *order) (string, error) {
	if o.set == "" {
		path := filepath.Join(b.dir, fmt.Sprintf("%s-%d.set", o.name, len(o.list)))
		h, err := startHandler(ctx, b.handler, b.dir, pageserver.PolicyCopy, o.memory, path)
		if err != nil {
			return "", err
		}
		c, err := b.startClones(ctx, h, o.memory, 1, 1)
		if err == nil {
			_, err = c.run(ctx, o, false)
			c.end()
		}
		// The set is complete when the session is over.
		if err = errors.Join(err, h.stop()); err != nil {
			return "", fmt.Errorf("record working set: %w", err)
		}
		o.set = path
	}
	raw, err := os.ReadFile(o.set)
	if err != nil {
		return "", err
	}
	// Clones add to it, and only so many are ever recorded: each server gets its own.
	path, err := b.emptySet(ctx, o)
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, raw, 0o600)
}

// noSet has nothing recorded or replayed.
func (b *bench) noSet(context.Context, *order) (string, error) { return "", nil }

// emptySet returns the path of a working set that is still to be recorded.
func (b *bench) emptySet(context.Context, *order) (string, error) {
	b.sets++
	return filepath.Join(b.dir, fmt.Sprintf("%d.set", b.sets)), nil
}
