// Package process holds on to the process of a VMM, whether this process
// started it or an earlier one did: by a pidfd, so that a recycled pid is never
// signalled, and without a thread that waits for each.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone means that the process has ended, or that its pid now belongs to
// another one.
var ErrGone = errors.New("process has ended")

// Process is a process that may outlive this one. Its methods may be called
// concurrently.
type Process struct {
	pid   int
	start uint64
	fd    *os.File      // the pidfd
	done  chan struct{} // closed when the process has ended
	idle  chan struct{} // closed when the watching goroutine has ended

	release sync.Once
}

// Started takes over a child that cmd has just started. Nobody else may wait
// for it: it is reaped here. When it fails, the child has been killed and reaped.
func Started(cmd *exec.Cmd) (*Process, error) {
	p, err := open(cmd.Process.Pid)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	go p.watch(cmd.Wait)
	return p, nil
}

// Adopt finds a process that another one started. The error wraps [ErrGone]
// when the pid is free or its process did not begin at start.
func Adopt(pid int, start uint64) (*Process, error) {
	p, err := open(pid)
	if err != nil {
		return nil, err
	}
	if p.start != start {
		_ = p.fd.Close()
		return nil, fmt.Errorf("adopt pid %d: %w: the pid is another process's now", pid, ErrGone)
	}
	go p.watch(nil)
	return p, nil
}

// open makes the pidfd first and reads the start time second: as long as the
// pidfd's process lives, its pid can't be recycled, so both are of one process
// when it has not ended afterwards. Who has ended may still be a zombie, and be
// signalled, when its new parent is slow to reap it: the pidfd is asked instead.
func open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("open pid %d: %w", pid, ErrGone)
		}
		return nil, fmt.Errorf("open pid %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid))
	start, err := StartTime(pid)
	if err == nil && readable(fd) {
		err = ErrGone
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open pid %d: %w", pid, err)
	}
	return &Process{pid: pid, start: start, fd: f, done: make(chan struct{}), idle: make(chan struct{})}, nil
}

// PID of the process.
func (p *Process) PID() int { return p.pid }

// StartTime of the process, in clock ticks since boot.
func (p *Process) StartTime() uint64 { return p.start }

// Done is closed when the process has ended. After [Process.Release] it may
// stay open for ever.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill sends SIGKILL. A process that has ended is no error.
func (p *Process) Kill() error {
	select {
	case <-p.done:
		return nil
	default:
	}
	err := signal(p.fd, unix.SIGKILL)
	if errors.Is(err, ErrGone) {
		return nil
	}
	return err
}

// Wait until the process has ended, or ctx.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for pid %d to end: %w", p.pid, context.Cause(ctx))
	}
}

// closing bounds how long a process that dies may be seen to live after its sockets
// are closed.
const closing = time.Second

// peerGone are the errors of a socket whose other end was closed.
var peerGone = []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE}

// Explains says whether the process has ended, and err comes of that. The kernel closes
// the sockets of a process that dies before it tells of the end (do_exit in
// kernel/exit.c: exit_files, then exit_notify), so where err is that of a
// connection whose peer has gone, the end is waited for, up to a second.
func (p *Process) Explains(err error) bool {
	select {
	case <-p.done:
		return true
	default:
	}
	if !slices.ContainsFunc(peerGone, func(gone error) bool { return errors.Is(err, gone) }) {
		return false
	}
	select {
	case <-p.done:
		return true
	case <-time.After(closing):
		return false
	}
}

// Release stops watching the process, which runs on, and waits for the
// goroutine that watched. It is idempotent.
func (p *Process) Release() error {
	p.release.Do(func() { _ = p.fd.Close() })
	<-p.idle
	return nil
}

// Dup returns a new pidfd of the process, for handing it to another one.
func (p *Process) Dup() (*os.File, error) {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("duplicate pidfd of %d: %w", p.pid, err)
	}
	n := -1
	var dupErr error
	err = raw.Control(func(fd uintptr) { n, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("duplicate pidfd of %d: %w", p.pid, err)
	}
	return os.NewFile(uintptr(n), "pidfd:"+strconv.Itoa(p.pid)), nil
}

// watch closes done when the process has ended, which a pidfd tells by becoming
// readable (pidfd_open(2)), so that the runtime's poller watches them all.
// reap, if any, is then called and returns at once.
func (p *Process) watch(reap func() error) {
	defer close(p.idle)
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return // released already
	}
	ended := false
	err = raw.Read(func(fd uintptr) bool {
		ended = readable(int(fd))
		return ended
	})
	if err != nil || !ended {
		return // released
	}
	if reap != nil {
		_ = reap()
	}
	close(p.done)
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return n == 1
		}
	}
}

func signal(pidfd *os.File, sig syscall.Signal) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sigErr error
	err = raw.Control(func(fd uintptr) { sigErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	switch {
	case err != nil:
		return fmt.Errorf("signal process: %w", err)
	case errors.Is(sigErr, unix.ESRCH):
		return ErrGone
	case sigErr != nil:
		return fmt.Errorf("signal process: %w", sigErr)
	}
	return nil
}

// StartTime reads when a process began, in clock ticks since boot
// (/proc/PID/stat, field 22, proc(5)). The error wraps [ErrGone] when there is
// no such process.
func StartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ESRCH):
		return 0, ErrGone
	case err != nil:
		return 0, fmt.Errorf("read start time: %w", err)
	}
	return parseStartTime(stat)
}

// parseStartTime takes field 22. The second field is the program's name in
// parentheses, and may itself hold blanks and parentheses.
func parseStartTime(stat []byte) (uint64, error) {
	_, rest, ok := cutLast(stat, ") ")
	fields := bytes.Fields(rest)
	const state, start = 3, 22
	if !ok || len(fields) <= start-state {
		return 0, fmt.Errorf("read start time: malformed stat %.80q", stat)
	}
	t, err := strconv.ParseUint(string(fields[start-state]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read start time: %w", err)
	}
	return t, nil
}

func cutLast(b []byte, sep string) (before, after []byte, found bool) {
	i := bytes.LastIndex(b, []byte(sep))
	if i < 0 {
		return nil, nil, false
	}
	return b[:i], b[i+len(sep):], true
}
