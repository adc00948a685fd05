package firecracker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/release"
)

// firecrackerIn puts a program into a new directory that says it is this version.
func firecrackerIn(t *testing.T, version string, others ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range append(others, Name) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho Firecracker v"+version+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, Name)
}

// TestFind holds the order in which a Firecracker is looked for.
func TestFind(t *testing.T) {
	find := func(o Options) string {
		t.Helper()
		p, err := New(o).Find(t.Context())
		if err != nil {
			return err.Error()
		}
		jailer := filepath.Join(filepath.Dir(p.Path), "jailer")
		if p.Jailer != "" && p.Jailer != jailer {
			t.Errorf("the jailer of %s is %s", p.Path, p.Jailer)
		}
		return strings.Join([]string{p.Version.String(), filepath.Base(p.Jailer)}, " ")
	}
	t.Setenv(EnvBinary, "")
	t.Setenv("PATH", t.TempDir())
	o := Options{Dir: filepath.Join(t.TempDir(), "firecracker")}
	_, err := New(o).Find(t.Context())
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "fcvm setup --engine firecracker") {
		t.Errorf("without any: %v", err)
	}
	t.Setenv("PATH", filepath.Dir(firecrackerIn(t, "1.9.0"))+":/bin")
	if got := find(o); got != "1.9.0 ." {
		t.Errorf("in PATH: %s", got)
	}
	own := firecrackerIn(t, "1.10.0", "jailer")
	if _, err := release.Install(t.Context(), release.Options{Dir: o.Dir, Program: own}); err != nil {
		t.Fatal(err)
	}
	if got := find(o); got != "1.10.0 jailer" {
		t.Errorf("set up: %s", got)
	}
	t.Setenv(EnvBinary, firecrackerIn(t, "1.11.0"))
	if got := find(o); got != "1.11.0 ." {
		t.Errorf("in the environment: %s", got)
	}
	o.Binary = firecrackerIn(t, "1.12.0", "jailer")
	if got := find(o); got != "1.12.0 jailer" {
		t.Errorf("named: %s", got)
	}
	o.Binary = "/no/such/firecracker"
	if got := find(o); !strings.Contains(got, "/no/such/firecracker") {
		t.Errorf("named, and not there: %s", got)
	}
	if _, err := New(o).Info(t.Context()); !errors.Is(err, vmm.ErrUnavailable) {
		t.Errorf("Info = %v", err)
	}
	// Replaced under its name.
	o = Options{Binary: own}
	e := New(o)
	if p, err := e.Find(t.Context()); err != nil || p.Version.String() != "1.10.0" {
		t.Fatalf("got %+v, %v", p, err)
	}
	if err := os.Rename(firecrackerIn(t, "1.13.10"), own); err != nil {
		t.Fatal(err)
	}
	if p, err := e.Find(t.Context()); err != nil || p.Version.String() != "1.13.10" {
		t.Errorf("got %+v, %v", p, err)
	}
}
