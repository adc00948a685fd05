//go:build linux

package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestDependencies holds PID 1 to its budget: it lies in the memory of every VM.
func TestDependencies(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("no go command here to list dependencies with")
	}
	out, err := exec.Command("go", "list", "-deps", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 20 {
		t.Fatalf("go list names %d packages only: %s", len(deps), out)
	}
	denied := []string{"net/http", "crypto/tls", "os/exec", "text/template", "github.com/spf13/cobra",
		"github.com/vishvananda/netlink", "github.com/klauspost/compress", "fcvm/internal/guest", "fcvm/internal/api"}
	for _, dep := range deps {
		for _, d := range denied {
			if dep == d || strings.HasPrefix(dep, d+"/") && d != "fcvm/internal/guest" {
				t.Errorf("fcvm-init depends on %s", dep)
			}
		}
	}
}
