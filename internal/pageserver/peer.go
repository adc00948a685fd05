//go:build linux

package pageserver

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	// errNotAllowed refuses a peer.
	errNotAllowed = errors.New("not allowed")
	errVMMEnded   = errors.New("check pidfd: the VMM has ended")
)

// credentials tells who connected (unix(7), SO_PEERCRED), and refuses who is
// neither root, nor this user, nor named.
func credentials(conn *net.UnixConn, allow []int) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if credErr != nil {
		return nil, fmt.Errorf("tell who connected: %w", credErr)
	}
	uid := int(cred.Uid)
	if uid != 0 && uid != os.Geteuid() && !slices.Contains(allow, uid) {
		return nil, fmt.Errorf("connection of user %d, pid %d: %w (see --allow-uid)", uid, cred.Pid, errNotAllowed)
	}
	return cred, nil
}

// process is the VMM of a session. A pidfd stays that of one process, whatever
// becomes of its number.
type process struct {
	pid int
	fd  *os.File
}

// peerProcess is the process that connected. SO_PEERPIDFD (Linux 6.5) tells it for
// certain; before that, the process that has the pid now.
func peerProcess(conn *net.UnixConn, cred *unix.Ucred) (*process, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var fdErr error
	if err := raw.Control(func(s uintptr) {
		fd, fdErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, err
	}
	if fdErr != nil {
		if fd, fdErr = unix.PidfdOpen(int(cred.Pid), 0); fdErr != nil {
			return nil, fmt.Errorf("open pidfd of the VMM (pid %d): %w", cred.Pid, fdErr)
		}
	}
	return newProcess(fd, cred)
}

// newProcess takes what must be a pidfd, of a process that the peer may have killed. It
// closes fd, and opens a pidfd of its own: that which came is also the sender's,
// who may not want it not to block.
func newProcess(fd int, cred *unix.Ucred) (*process, error) {
	defer unix.Close(fd)
	pid, err := pidOf(fd)
	if err != nil {
		return nil, err
	}
	if err := ownedBy(pid, cred); err != nil {
		return nil, err
	}
	own, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open pidfd of the VMM (pid %d): %w", pid, err)
	}
	if readable(fd) { // else the pid cannot have become another's yet
		_ = unix.Close(own)
		return nil, errVMMEnded
	}
	return &process{pid: pid, fd: os.NewFile(uintptr(own), "pidfd:"+strconv.Itoa(pid))}, nil
}

// ownedBy refuses a process of another user than the peer, who has no business in
// having it killed when a fault fails.
func ownedBy(pid int, cred *unix.Ucred) error {
	if cred.Uid == 0 || int(cred.Uid) == os.Geteuid() {
		return nil // may signal whatever this process may
	}
	fi, err := os.Stat("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return fmt.Errorf("check the VMM's user: %w", err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || st.Uid != cred.Uid {
		return fmt.Errorf("pid %d is not a process of user %d: %w", pid, cred.Uid, errNotAllowed)
	}
	return nil
}

// pidOf reads the pid of a pidfd from its fdinfo (proc_pid_fdinfo(5)).
func pidOf(fd int) (int, error) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, fmt.Errorf("check pidfd: %w", err)
	}
	for line := range bytes.Lines(info) {
		value, ok := bytes.CutPrefix(line, []byte("Pid:"))
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(string(bytes.TrimSpace(value)))
		switch {
		case err != nil:
			return 0, fmt.Errorf("check pidfd: %w", err)
		case pid < 0:
			return 0, errVMMEnded
		case pid == 0:
			return 0, errors.New("check pidfd: the VMM is not visible from here (another pid namespace)")
		}
		return pid, nil
	}
	return 0, errors.New("check pidfd: the second descriptor is none")
}

// waitEnd returns when the process has ended, or after close.
func (p *process) waitEnd() (ended bool) {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Read(func(fd uintptr) bool {
		ended = readable(int(fd))
		return ended
	})
	return ended
}

// kill ends the process at once. One that has ended is no error.
func (p *process) kill() error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	var killErr error
	if err := raw.Control(func(fd uintptr) { killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if killErr != nil && !errors.Is(killErr, unix.ESRCH) {
		return fmt.Errorf("kill pid %d: %w", p.pid, killErr)
	}
	return nil
}

func (p *process) close() { p.fd.Close() }

// readable tells whether a pidfd's process has ended.
func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return n == 1
		}
	}
}
