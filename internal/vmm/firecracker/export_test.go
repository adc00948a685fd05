package firecracker

import (
	"context"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
	"fcvm/internal/vmm/firecracker/jail"
)

// NewFake makes an engine that believes that KVM is usable.
func NewFake(o Options) *Engine {
	e := New(o)
	e.usable = func() error { return nil }
	return e
}

// NewFakeJailed makes one whose jails are on another host.
func NewFakeJailed(o Options, h *jail.Host) *Engine {
	e := NewFake(o)
	e.jailHost = h
	return e
}

// StartJailed starts a jailed Firecracker that has no VM yet, and hands it over.
func (e *Engine) StartJailed(ctx context.Context, p vmm.Place, m vmm.Machine) (_ vmm.VM, err error) {
	l, err := e.prepare(ctx, p, m, nil)
	if err != nil {
		return nil, err
	}
	defer func() { l.close(err != nil) }()
	for _, step := range []func() error{l.open, func() error { return l.run(ctx) }, func() error { return l.connect(ctx) }, func() error { return l.addNetwork(ctx) }} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return l.done(nil), nil
}

// FullSnapshot has Firecracker write the device state and all memory of a paused VM.
func FullSnapshot(ctx context.Context, v vmm.VM, state, mem string) error {
	f := v.(*vm)
	return f.do(ctx, func(c *fcapi.Client) error {
		return c.CreateSnapshot(ctx, fcapi.SnapshotCreate{Type: fcapi.Full, StateFile: state, MemoryFile: mem})
	})
}
