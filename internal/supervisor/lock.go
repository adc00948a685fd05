package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	for deadline := time.Now().Add(lockWait); ; {
		f, err := openLock(l)
		if err != nil {
			return nil, err
		}
		if locked(f, l) {
			if err := writePID(f); err != nil {
				_ = f.Close()
				return nil, err
			}
			return f, nil
		}
		pid := holder(f)
		_ = f.Close()
		// One that serves will not leave; one that does not is leaving or starting.
		serving := false
		if conn, err := net.Dial("unix", l.Socket()); err == nil {
			_ = conn.Close()
			serving = true
		}
		if serving || time.Now().After(deadline) {
			return nil, &api.Error{
				Code:    api.CodeConflict,
				Message: fmt.Sprintf("another supervisor (pid %s) serves %s", pid, l.Dir),
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// openLock opens the lock file. One that is leaving may take the directory away
// under us.
func openLock(l *datadir.Layout) (*os.File, error) {
	for try := 0; ; try++ {
		err := os.MkdirAll(l.Runtime, 0o700)
		if err == nil {
			var f *os.File
			if f, err = os.OpenFile(l.Lock(), os.O_CREATE|os.O_RDWR, 0o600); err == nil {
				return f, nil
			}
		}
		// MkdirAll says "exists" of a directory that went away before its second look.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) || try == 100 {
			return nil, fmt.Errorf("lock data directory: %w", err)
		}
	}
}

// locked locks f, and says whether it is still the lock file: who leaves removes
// it.
func locked(f *os.File, l *datadir.Layout) bool {
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false
	}
	held, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(l.Lock())
	return err == nil && os.SameFile(held, there)
}

func writePID(f *os.File) error {
	err := f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		return fmt.Errorf("write lock file: %w", err)
	}
	return nil
}

// leave gives the lock back and takes away the runtime directory, unless VMs or
// page servers still have sockets there.
func leave(f *os.File, l *datadir.Layout) {
	_ = os.Remove(l.Lock())
	_ = os.Remove(l.Runtime)
	_ = f.Close()
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
