package qemu_test

import (
	"testing"

	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/qemu"
	"fcvm/internal/vmm/vmmtest"
)

func newEngine() vmm.Engine { return qemu.New(qemu.Options{}) }

func TestMain(m *testing.M) { vmmtest.Main(m, newEngine) }

// Where ptrace is not allowed, all that needs no userfaultfd works the same.
func TestConformanceWithoutTracing(t *testing.T) {
	vmmtest.Run(t, func() vmm.Engine { return qemu.New(qemu.Options{NoTrace: true}) }, vmmtest.Called("ptrace forbidden"))
}

func TestConformance(t *testing.T) { vmmtest.Run(t, newEngine) }

// The same with a TAP, in a network namespace of each VM's own.
func TestConformanceOnTAP(t *testing.T) {
	if err := tapnet.Usable(); err != nil {
		t.Skip("no TAPs here:", err)
	}
	vmmtest.Run(t, newEngine, vmmtest.On(vmm.NetworkTAP), vmmtest.Called("on a TAP"))
}

func BenchmarkRestore(b *testing.B) { vmmtest.Bench(b, newEngine) }

// BenchmarkFloor is QEMU alone: it maps the memory file itself, untraced.
func BenchmarkFloor(b *testing.B) {
	vmmtest.Bench(b, func() vmm.Engine { return qemu.New(qemu.Options{NoTrace: true}) })
}
