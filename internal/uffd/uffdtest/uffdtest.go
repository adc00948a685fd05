//go:build linux

// Package uffdtest helps tests that use a real userfaultfd: it skips where this
// user has none, and fails a test binary that leaks descriptors.
package uffdtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// Main runs the tests of a package and then fails if a descriptor that tests
// like to forget is still open. Call it from TestMain with [testing.M.Run]'s
// receiver; it returns the exit code.
func Main(m interface{ Run() int }) int {
	before := open()
	code := m.Run()
	if code != 0 {
		return code
	}
	for fd, name := range open() {
		if before[fd] != name && watched(name) {
			fmt.Fprintf(os.Stderr, "leaked descriptor %s: %s\n", fd, name)
			code = 1
		}
	}
	return code
}

// watched leaves out what the runtime keeps for itself (epoll, eventfd), and the
// files that the testing package opens.
func watched(name string) bool {
	for _, kind := range []string{"[userfaultfd]", "userfaultfd", "memfd:", "pidfd", "socket:", "pipe:"} {
		if strings.Contains(name, kind) {
			return true
		}
	}
	return false
}

func open() map[string]string {
	found := make(map[string]string)
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		return found
	}
	for _, l := range links {
		if name, err := os.Readlink(l); err == nil {
			found[filepath.Base(l)] = name
		}
	}
	return found
}

// Open returns a userfaultfd with the features that a VMM asks for, closed when
// the test ends. The test is skipped where this user may not have one.
func Open(t testing.TB) *uffd.FD {
	t.Helper()
	Require(t)
	f, err := uffd.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.API(uffd.FeatureEventRemove); err != nil {
		t.Fatal(err)
	}
	return f
}

// Require skips the test where this user may not have a userfaultfd.
func Require(t testing.TB) {
	t.Helper()
	f, err := uffd.Open()
	switch {
	case errors.Is(err, uffd.ErrNotPermitted):
		t.Skipf("needs userfaultfd: %v", err)
	case errors.Is(err, unix.ENOSYS):
		t.Skip("needs a kernel with CONFIG_USERFAULTFD")
	case err != nil:
		t.Fatal(err)
	}
	f.Close()
}
