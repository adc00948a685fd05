// Package instance is what the VMs of all engines have in common: the VMM's process, and
// the one behind its TAP.
package instance

import (
	"errors"
	"fmt"

	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/process"
)

// VM is a part of an engine's own. Its methods may be called concurrently.
type VM struct {
	// Proc is the VMM's process.
	Proc *process.Process
	// Net is the network behind its TAP, nil without one.
	Net    *tapnet.Network
	handle vmm.Handle
}

// New takes over a VMM that runs, and its network, which is nil without a TAP. h lacks
// nothing but what these two know.
func New(p *process.Process, n *tapnet.Network, h vmm.Handle) *VM {
	h.PID, h.StartTime = p.PID(), p.StartTime()
	if n != nil {
		network := n.Handle()
		h.Network = &network
		n.Follow(p)
	}
	return &VM{Proc: p, Net: n, handle: h}
}

// Adopt is [vmm.Engine.Adopt] for the engine of this name. The VMM is not asked anything:
// one that hangs is adopted all the same, so that it can be killed.
func Adopt(engine string, h vmm.Handle) (*VM, error) {
	if h.Engine != engine {
		return nil, fmt.Errorf("adopt VM: it is of engine %q, not %s", h.Engine, engine)
	}
	p, err := process.Adopt(h.PID, h.StartTime)
	if errors.Is(err, process.ErrGone) {
		return nil, fmt.Errorf("%w: %w", vmm.ErrGone, err)
	}
	if err != nil {
		return nil, err
	}
	if h.Network == nil {
		return New(p, nil, h), nil
	}
	n, err := tapnet.Adopt(*h.Network, h.Runtime)
	if err != nil {
		_ = p.Release()
		return nil, err
	}
	return New(p, n, h), nil
}

// Handle implements [vmm.VM].
func (v *VM) Handle() vmm.Handle { return v.handle }

// Kill implements [vmm.VM].
func (v *VM) Kill() error { return v.Proc.Kill() }

// Done implements [vmm.VM]. The network's end comes after the VMM's.
func (v *VM) Done() <-chan struct{} {
	if v.Net != nil {
		return v.Net.Done()
	}
	return v.Proc.Done()
}

// Release implements [vmm.VM], as far as both processes go.
func (v *VM) Release() error {
	if v.Net != nil {
		v.Net.Release()
	}
	return v.Proc.Release()
}

// Gone wraps [vmm.ErrGone] around an error that comes of the VMM's end.
func (v *VM) Gone(err error) error {
	if err != nil && v.Proc.Explains(err) {
		return fmt.Errorf("%w: %w", vmm.ErrGone, err)
	}
	return err
}
