package qemu

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestUnknownAccelIsRefused(t *testing.T) {
	if _, err := chooseAccel("hvf"); err == nil || !strings.Contains(err.Error(), "kvm or tcg") {
		t.Errorf("error %v", err)
	}
}

// Where the processor's clock is fixed and known to the kernel, the figure in
// /proc/cpuinfo is the TSC's, so the measurement can be checked against it.
func TestTSCAgreesWithTheKernel(t *testing.T) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(info), " tsc_known_freq") {
		t.Skip("the kernel does not know this processor's TSC frequency (no tsc_known_freq)")
	}
	m := regexp.MustCompile(`(?m)^cpu MHz\s*: (\d+)\.(\d{3})$`).FindSubmatch(info)
	if m == nil {
		t.Skip("/proc/cpuinfo has no cpu MHz")
	}
	want, err := strconv.ParseFloat(string(m[1])+string(m[2]), 64)
	if err != nil {
		t.Fatal(err)
	}
	got := TSCKHz()
	if ratio := float64(got) / want; ratio < 0.999 || ratio > 1.001 {
		t.Errorf("measured %d kHz, the kernel says %.0f", got, want)
	}
	t.Logf("measured %d kHz, the kernel says %.0f", got, want)
}

func TestCPUModel(t *testing.T) {
	for _, tt := range []struct {
		a             accel
		chosen, model string
		recorded      string // its beginning
	}{
		{tcg, "", "max", "max"},
		{kvm, "", "host", "host"},
		{kvm, "host,-xsave", "host,-xsave", "host,-xsave"},
		{tcg, "qemu64", "qemu64", "qemu64"},
		{kvm, "EPYC,-avx", "EPYC,-avx", "EPYC,-avx"},
	} {
		model, recorded := cpuModel(tt.a, tt.chosen)
		if model != tt.model || !strings.HasPrefix(recorded, tt.recorded) {
			t.Errorf("%s, %q: got %q, recorded %q", tt.a, tt.chosen, model, recorded)
		}
	}
}
