// Package kvm tells what the host's KVM is good for.
package kvm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Usable says why KVM can't run guests here, or returns nil. A /dev/kvm that
// opens is not enough: in a nested, paravirtual KVM it creates VMs whose stock
// guests then spin for ever. There the processor has neither svm nor vmx.
func Usable() error {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return fmt.Errorf("read processor flags: %w", err)
	}
	defer f.Close()
	flags, err := cpuFlags(f)
	if err != nil {
		return err
	}
	if !slices.Contains(flags, "svm") && !slices.Contains(flags, "vmx") {
		return errors.New("the processor shows neither svm nor vmx: enable virtualization in the firmware, or nested virtualization where this is a VM")
	}
	return Open()
}

// kvmGetAPIVersion is KVM_GET_API_VERSION, _IO(0xAE, 0x00), of linux/kvm.h.
const kvmGetAPIVersion = 0xAE00

// Open tries to open it, without asking whether it can run a guest.
func Open() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no KVM: %w: load the module kvm_intel or kvm_amd", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("no KVM: %w: join the group kvm", err)
	case err != nil:
		return fmt.Errorf("no KVM: %w", err)
	}
	defer f.Close()
	// 12 is the only version there ever was; anything else is not KVM.
	v, err := unix.IoctlRetInt(int(f.Fd()), kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("no KVM: ask /dev/kvm for its version: %w", err)
	}
	if v != 12 {
		return fmt.Errorf("no KVM: /dev/kvm has version %d, not 12", v)
	}
	return nil
}

// cpuFlags reads the flags of the first processor in /proc/cpuinfo.
func cpuFlags(r io.Reader) ([]string, error) {
	return cpuField(r, "flags", strings.Fields)
}

func cpuField[T any](r io.Reader, name string, parse func(string) T) (T, error) {
	var zero T
	s := bufio.NewScanner(r)
	for s.Scan() {
		k, v, ok := strings.Cut(s.Text(), ":")
		if ok && strings.TrimSpace(k) == name {
			return parse(strings.TrimSpace(v)), nil
		}
	}
	if err := s.Err(); err != nil {
		return zero, fmt.Errorf("read /proc/cpuinfo: %w", err)
	}
	return zero, fmt.Errorf("read /proc/cpuinfo: no field %q", name)
}

// Processor is the host's processor by name, as snapshots record it: a guest under
// KVM sees it, so a clone on another one would be another machine. It is empty where
// nothing tells it.
func Processor() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	name, err := cpuField(f, "model name", strings.TrimSpace)
	if err != nil {
		return ""
	}
	return name
}
