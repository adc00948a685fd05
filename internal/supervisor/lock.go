package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/datadir"
)

// lockWait bounds the wait for a supervisor that is just about to leave.
const lockWait = 5 * time.Second

// acquire takes the lock of the data directory; closing the file gives it back.
func acquire(ctx context.Context, l *datadir.Layout) (*os.File, error) {
	f, err := os.OpenFile(l.Lock(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	for deadline := time.Now().Add(lockWait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock data directory: %w", err)
		}
		// One that serves will not leave; one that does not is leaving or starting.
		serving := false
		if conn, err := net.Dial("unix", l.Socket()); err == nil {
			_ = conn.Close()
			serving = true
		}
		if serving || time.Now().After(deadline) {
			pid := holder(f)
			_ = f.Close()
			return nil, &api.Error{
				Code:    api.CodeConflict,
				Message: fmt.Sprintf("another supervisor (pid %s) serves %s", pid, l.Dir),
			}
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("write lock file: %w", err)
	}
	return f, nil
}

func holder(f *os.File) string {
	buf := make([]byte, 16)
	n, _ := f.ReadAt(buf, 0)
	if pid := strings.TrimSpace(string(buf[:n])); pid != "" {
		return pid
	}
	return "unknown"
}

// notifyReady tells the program that started this one that it serves now.
func notifyReady() error {
	v := os.Getenv(api.EnvReadyFD)
	if v == "" {
		return nil
	}
	if err := os.Unsetenv(api.EnvReadyFD); err != nil {
		return err
	}
	fd, err := strconv.Atoi(v)
	if err != nil || fd < 3 {
		return fmt.Errorf("%s=%q is no file descriptor", api.EnvReadyFD, v)
	}
	f := os.NewFile(uintptr(fd), "ready")
	if f == nil {
		return fmt.Errorf("%s=%q is not open", api.EnvReadyFD, v)
	}
	_, err = f.WriteString("ready\n")
	return errors.Join(err, f.Close())
}
