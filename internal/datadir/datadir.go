// Package datadir knows where fcvm keeps things: the data directory that holds
// images, snapshots and VMs, and the runtime directory that holds sockets.
//
// Both belong to one user. The runtime directory is derived from the data
// directory, so that two data directories never share a supervisor. It is kept
// short because the path of a unix socket holds 107 bytes (unix(7)).
package datadir

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// EnvDir is the environment variable that names the data directory.
const EnvDir = "FCVM_DATA_DIR"

// Layout names every place below one data directory. The zero value is not
// usable; call [Open].
type Layout struct {
	// Dir is the data directory, absolute.
	Dir string
	// Runtime is the directory of this data directory's sockets, absolute and short.
	// It is there while a supervisor or a VM is.
	Runtime string
}

// Default returns the data directory that is used when none is named:
// $FCVM_DATA_DIR, else /var/lib/fcvm for root, else $XDG_DATA_HOME/fcvm.
func Default() (string, error) {
	if d := os.Getenv(EnvDir); d != "" {
		return d, nil
	}
	if os.Geteuid() == 0 {
		return "/var/lib/fcvm", nil
	}
	if d := os.Getenv("XDG_DATA_HOME"); d != "" {
		return filepath.Join(d, "fcvm"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find data directory: %w", err)
	}
	return filepath.Join(home, ".local", "share", "fcvm"), nil
}

// Open makes the data directory's directories where they are missing, all with
// mode 0700, and the one that runtime directories are in, which it checks to belong
// to this user alone. An empty dir means [Default].
func Open(dir string) (*Layout, error) {
	if dir == "" {
		d, err := Default()
		if err != nil {
			return nil, err
		}
		dir = d
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("find data directory %s: %w", dir, err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	// Two names of one directory must lead to one supervisor.
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return nil, fmt.Errorf("find data directory: %w", err)
	}
	l := &Layout{Dir: abs}
	for _, d := range []string{l.Images(), l.Guest(), l.Snapshots(), l.VMs()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make data directory: %w", err)
		}
	}
	base := runtimeBase()
	if err := privateDir(base); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(abs))
	// The supervisor makes it, and takes it away: most commands have no use for it.
	l.Runtime = filepath.Join(base, hex.EncodeToString(sum[:4]))
	return l, nil
}

func runtimeBase() string {
	if os.Geteuid() == 0 {
		return "/run/fcvm"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "fcvm")
	}
	return filepath.Join(os.TempDir(), "fcvm-"+strconv.Itoa(os.Geteuid()))
}

// privateDir makes dir with mode 0700, and refuses one that another user owns
// or may write: /tmp is open to everybody.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make runtime directory: %w", err)
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("check runtime directory: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !fi.IsDir() || !ok || int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("runtime directory %s is not a private directory of this user; remove it or set XDG_RUNTIME_DIR", dir)
	}
	return nil
}

// Images is where internal/image keeps root file systems.
func (l *Layout) Images() string { return filepath.Join(l.Dir, "images") }

// Guest is where internal/guest keeps the kernel and the initramfs.
func (l *Layout) Guest() string { return filepath.Join(l.Dir, "guest") }

// Firecracker is where internal/vmm/firecracker/release keeps a release. It may be
// missing.
func (l *Layout) Firecracker() string { return filepath.Join(l.Dir, "firecracker") }

// Snapshots is where internal/snapshot keeps snapshots.
func (l *Layout) Snapshots() string { return filepath.Join(l.Dir, "snapshots") }

// VMs holds one directory a VM.
func (l *Layout) VMs() string { return filepath.Join(l.Dir, "vms") }

// VM is the directory of the VM with this ID.
func (l *Layout) VM(id string) string { return filepath.Join(l.VMs(), id) }

// VMRuntime is the directory of the sockets of the VM with this ID.
func (l *Layout) VMRuntime(id string) string { return filepath.Join(l.Runtime, id) }

// Socket is the supervisor's API socket.
func (l *Layout) Socket() string { return filepath.Join(l.Runtime, "api.sock") }

// Lock is held (flock) by the running supervisor; it contains its pid.
func (l *Layout) Lock() string { return filepath.Join(l.Runtime, "serve.lock") }

// ServeLog is the log of a supervisor that was started on demand.
func (l *Layout) ServeLog() string { return filepath.Join(l.Dir, "serve.log") }
