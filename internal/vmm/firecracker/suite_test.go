package firecracker_test

import (
	"os"
	"testing"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/firecracker/jail"
	"fcvm/internal/vmm/merge"
	"fcvm/internal/vmm/vmmtest"
)

func newEngine() vmm.Engine { return firecracker.New(firecracker.Options{}) }

func TestMain(m *testing.M) {
	merge.Main()
	switch _, fake := os.LookupEnv(envFake); {
	case programName() == "jailer":
		fakeJailer(os.Args[1:])
		return
	case fake, programName() == "firecracker":
		fakeFirecracker(os.Args[1:])
		return
	}
	vmmtest.Main(m, newEngine)
}

// The suite needs the real Firecracker and a real KVM; test/kvmlab has one.
func TestConformance(t *testing.T) {
	vmmtest.Run(t, newEngine, vmmtest.On(vmm.NetworkTAP), vmmtest.Dumps(firecracker.FullSnapshot))
}

// The same under the jailer.
func TestJailedConformance(t *testing.T) {
	if _, err := jail.ThisHost(); err != nil {
		t.Skip(err)
	}
	vmmtest.Run(t, newEngine, vmmtest.On(vmm.NetworkTAP), vmmtest.Jailed(jail.Remove))
}
