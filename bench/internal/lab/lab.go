// Package lab is a data directory of its own for benchmarks, with a guest and an
// nginx image, and the CLI that users type.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"fcvm/internal/datadir"
	"fcvm/test/images"
)

// Lab is one. Its methods are called from one goroutine at a time.
type Lab struct {
	// Bin is the directory of the built programs, Dir one that is removed by Close.
	Bin, Dir string
	// Image is nginx, as `fcvm run` takes it.
	Image string
}

// New sets up a lab. The caller closes it.
func New(ctx context.Context, bin string) (*Lab, error) {
	dir, err := os.MkdirTemp("", "fcvm-bench")
	if err != nil {
		return nil, err
	}
	l := &Lab{Bin: bin, Dir: dir}
	if err := l.prepare(ctx); err != nil {
		l.Close()
		return nil, fmt.Errorf("set up lab: %w", err)
	}
	return l, nil
}

func (l *Lab) prepare(ctx context.Context) error {
	cache, err := images.CacheDir()
	if err != nil {
		return err
	}
	img, err := images.Build(ctx, "nginx", cache)
	if err != nil {
		return err
	}
	layout := filepath.Join(l.Dir, "nginx")
	if err := images.WriteOCI(layout, img, "latest"); err != nil {
		return err
	}
	l.Image = "oci:" + layout
	// A guest that this user has set up is as good, and needs no network.
	if own, err := datadir.Default(); err == nil {
		if guest := filepath.Join(own, "guest"); exists(guest) {
			if err := errors.Join(os.MkdirAll(l.Data(), 0o700), os.Symlink(guest, filepath.Join(l.Data(), "guest"))); err != nil {
				return err
			}
		}
	}
	if _, err := l.FCVM(ctx, "setup"); err != nil {
		return err
	}
	_, err = l.FCVM(ctx, "image", "load", l.Image)
	return err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Close removes every VM, the supervisor and the directory.
func (l *Lab) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Clear(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
	}
	_, _ = l.FCVM(ctx, "serve", "--stop")
	if d, err := datadir.Open(l.Data()); err == nil {
		_ = os.RemoveAll(d.Runtime)
	}
	_ = os.RemoveAll(l.Dir)
}

// Data is the data directory.
func (l *Lab) Data() string { return filepath.Join(l.Dir, "data") }

// Clear removes all VMs.
func (l *Lab) Clear(ctx context.Context) error {
	out, err := l.FCVM(ctx, "ls", "-a", "-q")
	if err != nil || out == "" {
		return err
	}
	_, err = l.FCVM(ctx, append([]string{"rm", "-f"}, strings.Fields(out)...)...)
	return err
}

// FCVM runs a command of the CLI and returns its standard output.
func (l *Lab) FCVM(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(l.Bin, "fcvm"), args...)
	cmd.Env = append(os.Environ(), "FCVM_DATA_DIR="+l.Data())
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("fcvm %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// Timed runs a command of the CLI and returns how long it took, its start and
// end included: what a user waits.
func (l *Lab) Timed(ctx context.Context, args ...string) (time.Duration, error) {
	start := time.Now()
	_, err := l.FCVM(ctx, args...)
	return time.Since(start), err
}

// FreePorts returns the first of n consecutive TCP ports that are free.
func FreePorts(n int) (int, error) {
	for first := 20000; first+n < 32000; first += n {
		if allFree(first, n) {
			return first, nil
		}
	}
	return 0, errors.New("no free ports")
}

func allFree(first, n int) bool {
	for p := first; p < first+n; p++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", p))
		if err != nil {
			return false
		}
		_ = l.Close()
	}
	return true
}
