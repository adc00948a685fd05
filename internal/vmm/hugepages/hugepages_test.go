package hugepages

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// machine writes a /sys of a machine with these numbers.
func machine(t *testing.T, total, free, reserved int) string {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "sys/kernel/mm/hugepages/hugepages-2048kB")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]int{"nr_hugepages": total, "free_hugepages": free, "resv_hugepages": reserved} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strconv.Itoa(n)+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestPool(t *testing.T) {
	p, err := Read(machine(t, 300, 120, 20))
	if want := (Pool{Total: 300, Free: 100}); err != nil || p != want {
		t.Fatalf("%+v, %v; want %+v", p, err, want)
	}
	if err := p.Need(100); err != nil {
		t.Error(err)
	}
	// 200 are taken or promised.
	if err := p.Need(101); err == nil || !strings.Contains(err.Error(), "100 huge pages") || !strings.Contains(err.Error(), "vm.nr_hugepages=301") {
		t.Errorf("error %v", err)
	}
	// More may be promised than is free: the kernel counts both by itself.
	if p, err := Read(machine(t, 4, 1, 2)); err != nil || p.Free != 0 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestNoPool(t *testing.T) {
	if _, err := Read(t.TempDir()); !errors.Is(err, ErrNone) {
		t.Errorf("error %v", err)
	}
	root := machine(t, 1, 1, 0)
	if err := os.WriteFile(filepath.Join(root, "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"), []byte("many"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(root); err == nil || errors.Is(err, ErrNone) {
		t.Errorf("error %v", err)
	}
}
