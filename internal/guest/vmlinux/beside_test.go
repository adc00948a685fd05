package vmlinux

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestBesideUnpacksOnce(t *testing.T) {
	dir := t.TempDir()
	kernel := madeUp(testSize)
	path := filepath.Join(dir, "vmlinuz-0123")
	if err := os.WriteFile(path, images(t, kernel)["xz-x86"], 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			elf, err := Beside(path)
			if err != nil || elf != filepath.Join(dir, "vmlinux-0123") {
				t.Errorf("path %q, error %v", elf, err)
				return
			}
			if got, err := os.ReadFile(elf); err != nil || !bytes.Equal(got, kernel) {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
		})
	}
	wg.Wait()
	// The image is not needed again.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Beside(path); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, error %v", left, err)
	}
}

func TestBesideTakesAnELFKernelAsItIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vmlinuz-0123")
	if err := os.WriteFile(path, madeUp(100), 0o600); err != nil {
		t.Fatal(err)
	}
	if elf, err := Beside(path); err != nil || elf != path {
		t.Errorf("path %q, error %v", elf, err)
	}
}

func TestBesideLeavesNothingOfADamagedImage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "vmlinuz-0123")
	if err := os.WriteFile(path, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Beside(path); err == nil {
		t.Error("no error")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, error %v", left, err)
	}
	if _, err := Beside(filepath.Join(dir, "none")); err == nil {
		t.Error("no error where there is no image")
	}
}
