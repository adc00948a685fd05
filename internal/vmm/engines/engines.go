// Package engines lists the engines that fcvm has.
package engines

import (
	"fcvm/internal/datadir"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/qemu"
)

// All returns the engines, in the order in which [vmm.Choose] asks them: Firecracker,
// which is small and needs KVM, and QEMU, which runs everywhere.
func All(l *datadir.Layout) []vmm.Named {
	return []vmm.Named{
		{Name: firecracker.Name, Engine: firecracker.New(firecracker.Options{Dir: l.Firecracker()})},
		{Name: qemu.Name, Engine: qemu.New(qemu.Options{})},
	}
}
