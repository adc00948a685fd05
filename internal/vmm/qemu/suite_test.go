package qemu_test

import (
	"testing"

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

func BenchmarkRestore(b *testing.B) { vmmtest.Bench(b, newEngine) }

// BenchmarkFloor is QEMU alone: it maps the memory file itself, untraced.
func BenchmarkFloor(b *testing.B) {
	vmmtest.Bench(b, func() vmm.Engine { return qemu.New(qemu.Options{NoTrace: true}) })
}
