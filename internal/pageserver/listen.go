//go:build linux

package pageserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse means that another process listens on a socket.
var ErrInUse = errors.New("in use by another process")

// Listen makes a unix socket with a mode. A socket that nobody listens on any
// more is replaced; one where somebody does is [ErrInUse]. Closing the listener removes it.
func Listen(ctx context.Context, path string, mode fs.FileMode) (*net.UnixListener, error) {
	// unix(7): sun_path has 108 bytes, one of them for the terminating zero.
	if len(path) > 107 {
		return nil, fmt.Errorf("listen on %s: the path has %d bytes, a socket's holds 107: choose a shorter one", path, len(path))
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("listen on %s: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func removeStale(ctx context.Context, path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return errors.New("it is there, and not a socket")
	}
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
		return ErrInUse
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}
