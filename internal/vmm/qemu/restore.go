package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"fcvm/internal/uffd/attach"
	"fcvm/internal/vmm"
)

// Restore implements [vmm.Engine].
//
// Where tracing is not allowed, a clone by file has its memory mapped by QEMU
// itself, which costs the host nothing; one by uffd fails with an error that
// wraps [vmm.ErrAttach].
func (e *Engine) Restore(ctx context.Context, c vmm.RestoreConfig) (vmm.VM, error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	if err := checkMemory(c); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	v, err := e.restore(ctx, c, !e.noTrace)
	if errors.Is(err, attach.ErrForbidden) {
		if c.Memory.Backend == vmm.BackendUFFD {
			return nil, fmt.Errorf("restore: %w: %w", vmm.ErrAttach, err)
		}
		v, err = e.restore(ctx, c, false)
	}
	if err != nil {
		return nil, err
	}
	return v, nil
}

func checkMemory(c vmm.RestoreConfig) error {
	if c.Memory.File == nil {
		return errors.New("no memory file")
	}
	if c.Memory.Merge && !c.Memory.Copied {
		return errors.New("merge pages: only those that are copied can be")
	}
	switch c.Memory.Backend {
	case vmm.BackendFile, vmm.BackendUFFD:
	default:
		return fmt.Errorf("mem backend %q: want uffd or file", c.Memory.Backend)
	}
	// A page of the mapping that is behind the end of the file would be a
	// SIGBUS, at any later time.
	info, err := c.Memory.File.Stat()
	if err != nil {
		return fmt.Errorf("look at memory file: %w", err)
	}
	if info.Size() < c.MemoryBytes {
		return fmt.Errorf("memory file %s has %d of %d bytes: the snapshot is damaged", c.Memory.File.Name(), info.Size(), c.MemoryBytes)
	}
	return nil
}

func (e *Engine) restore(ctx context.Context, c vmm.RestoreConfig, traced bool) (_ *vm, err error) {
	l, err := e.prepare(ctx, c.Place, c.Machine, c.Ports)
	if err != nil {
		return nil, err
	}
	defer func() { l.close(err != nil) }()
	state, err := os.Open(c.State)
	if err != nil {
		return nil, fmt.Errorf("restore: open device state: %w", err)
	}
	l.owned = append(l.owned, state)
	l.m.stateFD, l.m.paused, l.m.merge = l.add(state), c.Paused, c.Memory.Merge
	if err := l.open(ctx); err != nil {
		return nil, err
	}
	var regions []vmm.Region
	switch {
	case traced:
		regions, err = l.runAttached(ctx, c)
	case c.Memory.Backend == vmm.BackendUFFD:
		err = attach.ErrForbidden
	default:
		l.m.memFD = l.add(c.Memory.File)
		err = l.run(ctx, startKeepingFile)
	}
	if err != nil {
		return nil, err
	}
	status, err := l.connect(ctx)
	if err != nil {
		return nil, err
	}
	loaded := l.running
	if c.Paused {
		loaded = l.loaded
	}
	if err := loaded(ctx, status); err != nil {
		return nil, err
	}
	if regions == nil {
		if regions, err = guestRegions(ctx, l.client, l.proc.PID(), c.MemoryBytes); err != nil {
			return nil, l.explain(ctx, err)
		}
	}
	if err := l.publish(ctx); err != nil {
		return nil, err
	}
	return l.done(regions), nil
}

// runAttached starts QEMU with its memory replaced by the memory file, and for
// BackendUFFD hands its userfaultfd to the page server.
func (l *launch) runAttached(ctx context.Context, c vmm.RestoreConfig) ([]vmm.Region, error) {
	served := c.Memory.Backend == vmm.BackendUFFD
	var got *attach.Attached
	l.traced = true
	err := l.run(ctx, func(cmd *exec.Cmd) error {
		var err error
		got, err = attach.Start(ctx, cmd, attach.Config{
			Size:      c.MemoryBytes,
			File:      c.Memory.File,
			Userfault: served,
			Wrapped:   l.net != nil,
		})
		return err
	})
	if got != nil && got.UFFD != nil {
		defer got.UFFD.Close()
	}
	if err != nil {
		return nil, l.explainAttach(ctx, err)
	}
	region := vmm.Region{Addr: got.Addr, Size: c.MemoryBytes}
	if served {
		if err := l.shakeHands(ctx, c.Memory.Socket, got.UFFD, region); err != nil {
			return nil, fmt.Errorf("restore: %w", err)
		}
	}
	return []vmm.Region{region}, nil
}

// explainAttach tells what QEMU said when it ended while it was traced, as it
// does when a port is taken.
func (l *launch) explainAttach(ctx context.Context, err error) error {
	if errors.Is(err, attach.ErrForbidden) || ctx.Err() != nil || tail(filepath.Join(l.m.Dir, vmmLog), l.said, 1) == "" {
		return err
	}
	return l.ended()
}
