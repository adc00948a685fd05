package vmmtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
	"fcvm/internal/uffd"
	"fcvm/internal/vmm"
)

// servePages starts a page server for clones of s. It lives as long as the test,
// and must then have no clone left.
func (l *lab) servePages(t testing.TB, b backend, s *snapshot) vmm.Memory {
	t.Helper()
	fd, err := uffd.Open()
	if errors.Is(err, uffd.ErrNotPermitted) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = fd.Close()
	dir, err := os.MkdirTemp(l.dir, "pages")
	if err != nil {
		t.Fatal(err)
	}
	server, err := keeper.Start(t.Context(), keeper.Config{
		Binary:  filepath.Join(l.bin, "uffd_handler"),
		Dir:     dir,
		Runtime: dir,
		MemFile: s.mem,
		Size:    l.machine.MemoryBytes,
		Policy:  pageserver.Policy(b.policy),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, keeper.LogName))
			t.Logf("page server: %s", log)
		}
		// The test's own context has ended.
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := server.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	template, err := server.Template()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = template.Close() })
	return vmm.Memory{Backend: vmm.BackendUFFD, File: template, Socket: server.Socket(), Copied: b.policy == string(pageserver.PolicyCopy)}
}
