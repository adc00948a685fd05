package datadir

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	l, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{l.Images(), l.Guest(), l.Snapshots(), l.VMs()} {
		fi, err := os.Stat(d)
		if err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", d, fi, err)
		}
	}
	// Commands that only look leave nothing where sockets live.
	if _, err := os.Lstat(l.Runtime); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("runtime directory: %v", err)
	}
	// A VM's sockets fit into 107 bytes.
	if p := filepath.Join(l.VMRuntime("0123456789ab"), "agent.sock"); len(p) > 107 {
		t.Errorf("%s has %d bytes", p, len(p))
	}

	alias := filepath.Join(t.TempDir(), "alias")
	if err := os.Symlink(dir, alias); err != nil {
		t.Fatal(err)
	}
	same, err := Open(alias)
	if err != nil || same.Runtime != l.Runtime {
		t.Errorf("two names of one directory have two supervisors: %v, %v", same, err)
	}
	other, err := Open(t.TempDir())
	if err != nil || other.Runtime == l.Runtime {
		t.Errorf("two directories have one supervisor: %v, %v", other, err)
	}
}

func TestPrivateDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := privateDir(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := privateDir(dir); err == nil {
		t.Error("a directory that everybody may write to was accepted")
	}
}
