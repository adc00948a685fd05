package vmmtest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"fcvm/internal/network/netmain"
	"fcvm/internal/vmm"
)

// envChild makes the test binary boot one VM and end; it holds a JSON
// [vmm.BootConfig].
const envChild = "FCVM_VMMTEST_BOOT"

// Main runs the tests, or, in a process that the suite has started, boots a VM
// and leaves it behind. It does not return.
func Main(m *testing.M, newEngine New) {
	netmain.Intercept()
	config := os.Getenv(envChild)
	if config == "" {
		os.Exit(m.Run())
	}
	h, err := bootAndLeave(newEngine(), config)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(h)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func bootAndLeave(e vmm.Engine, config string) (vmm.Handle, error) {
	var c vmm.BootConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return vmm.Handle{}, err
	}
	v, err := e.Boot(context.Background(), c)
	if err != nil {
		return vmm.Handle{}, err
	}
	// Not released: a supervisor that is killed releases nothing.
	return v.Handle(), nil
}

// bootElsewhere boots a VM from a process that has ended when this returns.
func (l *lab) bootElsewhere(t *testing.T, c vmm.BootConfig) vmm.Handle {
	t.Helper()
	config, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(within(t), exe)
	cmd.Env = append(os.Environ(), envChild+"="+string(config))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("boot in another process: %v", err)
	}
	var h vmm.Handle
	if err := json.Unmarshal(out, &h); err != nil {
		t.Fatalf("boot in another process: %v: %q", err, out)
	}
	return h
}
