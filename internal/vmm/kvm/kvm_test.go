package kvm

import (
	"strings"
	"testing"
)

func TestCPUFlags(t *testing.T) {
	const info = "processor\t: 0\nmodel name\t: Some CPU: the big one\nflags\t\t: fpu vme svm\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n"
	flags, err := cpuFlags(strings.NewReader(info))
	if err != nil || strings.Join(flags, " ") != "fpu vme svm" {
		t.Errorf("flags %v, error %v", flags, err)
	}
	if _, err := cpuFlags(strings.NewReader("processor : 0\n")); err == nil {
		t.Error("no error where there are no flags")
	}
	name, err := cpuField(strings.NewReader(info), "model name", strings.TrimSpace)
	if err != nil || name != "Some CPU: the big one" {
		t.Errorf("name %q, error %v", name, err)
	}
}
