// Package qemu is the engine that runs VMs with an unmodified QEMU, on its
// "microvm" machine, under KVM or TCG.
package qemu

import (
	"context"
	"errors"

	"fcvm/internal/vmm"
)

// EnvBinary names the QEMU to use when [Options] does not.
const EnvBinary = "FCVM_QEMU"

// EnvAccel is "kvm" or "tcg" to force an accelerator when [Options] does not.
const EnvAccel = "FCVM_QEMU_ACCEL"

// Options of an engine. The zero value is the default.
type Options struct {
	// Binary is QEMU's path or name; empty means $FCVM_QEMU, else
	// qemu-system-x86_64 in PATH.
	Binary string
	// ForceAccel is "kvm" or "tcg"; empty means $FCVM_QEMU_ACCEL, else KVM where
	// it is really usable, else TCG.
	ForceAccel string
}

// Engine implements [vmm.Engine].
type Engine struct {
	opts Options
}

var _ vmm.Engine = (*Engine)(nil)

// New makes an engine. It looks for nothing yet: see [Engine.Info].
func New(o Options) *Engine { return &Engine{opts: o} }

// Info implements [vmm.Engine].
func (e *Engine) Info(ctx context.Context) (vmm.Info, error) {
	return vmm.Info{}, errors.ErrUnsupported
}

// Boot implements [vmm.Engine].
func (e *Engine) Boot(ctx context.Context, c vmm.BootConfig) (vmm.VM, error) {
	return nil, errors.ErrUnsupported
}

// Restore implements [vmm.Engine].
func (e *Engine) Restore(ctx context.Context, c vmm.RestoreConfig) (vmm.VM, error) {
	return nil, errors.ErrUnsupported
}

// Adopt implements [vmm.Engine].
func (e *Engine) Adopt(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	return nil, errors.ErrUnsupported
}
