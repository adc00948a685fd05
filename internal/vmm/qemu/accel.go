package qemu

import (
	"fmt"
	"strings"

	vmmkvm "fcvm/internal/vmm/kvm"
)

// accel is how QEMU runs guest code.
type accel string

const (
	kvm accel = "kvm"
	tcg accel = "tcg"
)

// chooseAccel takes what is forced, else KVM where it is really usable.
func chooseAccel(forced string) (accel, error) {
	switch a := accel(forced); a {
	case kvm:
		// Whether the processor's flags are there is not asked: that is what
		// forcing is for.
		if err := vmmkvm.Open(); err != nil {
			return "", err
		}
		return kvm, nil
	case tcg:
		return tcg, nil
	case "":
		if vmmkvm.Usable() == nil {
			return kvm, nil
		}
		return tcg, nil
	default:
		return "", fmt.Errorf("accelerator %q is unknown: use kvm or tcg", forced)
	}
}

// cpuModel returns the CPU model for QEMU's -cpu, the chosen one unless that is
// empty, and what the snapshot's manifest records.
func cpuModel(a accel, chosen string) (model, recorded string) {
	switch {
	case chosen != "":
		model = chosen
	case a == tcg:
		model = "max"
	default:
		model = "host"
	}
	base, _, _ := strings.Cut(model, ",")
	if name := vmmkvm.Processor(); base == "host" && name != "" {
		return model, model + ": " + name
	}
	return model, model
}
