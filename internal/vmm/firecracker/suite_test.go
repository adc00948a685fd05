package firecracker_test

import (
	"os"
	"testing"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/merge"
	"fcvm/internal/vmm/vmmtest"
)

func newEngine() vmm.Engine { return firecracker.New(firecracker.Options{}) }

func TestMain(m *testing.M) {
	merge.Main()
	if _, ok := os.LookupEnv(envFake); ok {
		fakeFirecracker(os.Args[1:])
		return
	}
	vmmtest.Main(m, newEngine)
}

// The suite needs the real Firecracker and a real KVM; test/kvmlab has one.
func TestConformance(t *testing.T) {
	vmmtest.Run(t, newEngine, vmmtest.On(vmm.NetworkTAP), vmmtest.UpTo3GiB)
}
