//go:build linux

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// confine takes from the process what it needs no more: it has opened its files, and
// from here on gets descriptors by its sockets only. VMMs and their guests are not to be
// trusted, and this process holds the memory of all clones.
//
//   - no_new_privs, and no capability. It kills VMMs of its own user only; others
//     are the supervisor's to kill.
//   - Landlock (Linux 5.13): no file, except the numbers of its own descriptors in
//     /proc, and the sockets that it removes in the end. No TCP (6.7).
//   - seccomp: no system call but those that it and Go's runtime make from then on;
//     all others fail with EPERM.
//
// Where the kernel has no Landlock or no seccomp, that is logged. All of it holds
// for every thread.
func confine(o options, log *slog.Logger) error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == unix.ENOTSUP { // of Go, not of the kernel
		log.Warn("not confined, as this program was built with cgo; build it with CGO_ENABLED=0")
		return nil
	}
	if errno != 0 {
		return fmt.Errorf("set no_new_privs: %w", errno)
	}
	if err := landlock(o); errors.Is(err, errNoLandlock) {
		log.Info("no Landlock here: files are protected by permissions only", "error", err)
	} else if err != nil {
		return err
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	if !seccomp.Supported() {
		log.Info("no seccomp here: all system calls stay allowed")
		return nil
	}
	return seccomp.LoadFilter(seccomp.Filter{Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
		DefaultAction: seccomp.ActionErrno,
		Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: systemCalls}},
	}})
}

// systemCalls are those that are made after the start.
var systemCalls = []string{
	// Serving: events, pages, the template, the page cache, the ledger.
	"read", "write", "ioctl", "pread64", "preadv2", "pwrite64", "fadvise64", "epoll_pwait", "epoll_ctl", "memfd_create", "ftruncate",
	"mmap", "munmap", "mlock", "fcntl", "fstat", "lseek", "close", "sched_getattr", "sched_setattr",
	// Sockets that listen, and what comes over them.
	"accept4", "recvmsg", "sendmsg", "getsockopt", "setsockopt", "getsockname", "getpeername", "shutdown",
	// VMMs: who they are, whether they have ended, their end.
	"openat", "readlinkat", "newfstatat", "pidfd_open", "pidfd_send_signal", "poll", "ppoll", "geteuid", "unlinkat",
	// Go's runtime: memory, threads, time, signals.
	"brk", "madvise", "mprotect", "mincore", "clone", "clone3", "set_robust_list", "rseq", "futex", "exit", "exit_group", "sched_yield",
	"sched_getaffinity", "nanosleep", "clock_nanosleep", "clock_gettime", "gettimeofday", "getpid", "gettid", "tgkill", "kill",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "epoll_wait", "eventfd2", "pipe2", "uname",
	"getrandom", "prctl", "prlimit64", "setitimer", "timer_create", "timer_settime", "timer_delete", "arch_prctl",
}

func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
	runtime.KeepAlive(&header)
	runtime.KeepAlive(&none)
	if errno != 0 {
		return fmt.Errorf("drop capabilities: %w", errno)
	}
	return nil
}

// errNoLandlock means that the kernel has none, or was started without it.
var errNoLandlock = errors.New("kernel without Landlock")

// What Landlock takes away, by the version of its ABI that knows it
// (include/uapi/linux/landlock.h).
const (
	fsRights1 = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE |
		unix.LANDLOCK_ACCESS_FS_READ_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
		unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
		unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_SYM
	netRights4 = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
)

// landlockABI is the version of Landlock that the kernel has.
func landlockABI() (int, error) {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP {
		return 0, fmt.Errorf("%w: %w", errNoLandlock, errno)
	}
	if errno != 0 {
		return 0, fmt.Errorf("ask for Landlock: %w", errno)
	}
	return int(abi), nil
}

func landlock(o options) error {
	abi, err := landlockABI()
	if err != nil {
		return err
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: fsRights1}
	if abi >= 2 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 4 {
		attr.Handled_access_net = netRights4
	}
	// An older kernel, whose struct ends sooner, wants zeros behind that, which they are.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("make Landlock ruleset: %w", errno)
	}
	defer unix.Close(int(fd))
	if err := allow(int(fd), "/proc/self/fdinfo", unix.LANDLOCK_ACCESS_FS_READ_FILE); err != nil {
		return err
	}
	for _, socket := range []string{o.socket, o.control} {
		if _, isFD := inherited(socket); socket == "" || socket == "-" || isFD {
			continue
		}
		if err := allow(int(fd), filepath.Dir(socket), unix.LANDLOCK_ACCESS_FS_REMOVE_FILE); err != nil {
			return err
		}
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("restrict itself by Landlock: %w", errno)
	}
	return nil
}

// allow grants rights below a directory.
func allow(ruleset int, dir string, rights uint64) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("grant access to %s: %w", dir, err)
	}
	defer unix.Close(fd)
	attr := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("grant access to %s: %w", dir, errno)
	}
	return nil
}
