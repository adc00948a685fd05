//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Device grants userfaultfd to whoever may open it (Linux 6.1 and later); its
// mode and owner are the administrator's to set.
const Device = "/dev/userfaultfd"

// ErrNotPermitted means that this user may neither open [Device] nor call
// userfaultfd(2).
var ErrNotPermitted = errors.New("userfaultfd is not permitted")

// NewRequest is the ioctl on [Device] that creates a userfaultfd; its argument
// are open flags. It is exported for internal/uffd/attach, which has another
// process issue it.
const NewRequest = ioctlNew

// OpenDevice opens [Device]. The error wraps [fs.ErrNotExist] on kernels that
// have none, and [fs.ErrPermission] where this user was not granted it.
func OpenDevice() (*os.File, error) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open userfaultfd device: %w", err)
	}
	return f, nil
}

// Open creates a userfaultfd for this process, close-on-exec and not blocking.
// It prefers [Device], which an administrator can grant, to the system call,
// which needs CAP_SYS_PTRACE or the sysctl vm.unprivileged_userfaultfd. It
// never falls back to one that is blind to faults from within the kernel
// (UFFD_USER_MODE_ONLY): a VMM that reads guest memory by a system call would
// get EFAULT. The error wraps [ErrNotPermitted] where both ways are closed.
//
// The descriptor does nothing before [FD.API].
func Open() (*FD, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	dev, devErr := OpenDevice()
	if devErr == nil {
		defer dev.Close()
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), ioctlNew, flags)
		if errno == 0 {
			return newFD(int(fd)), nil
		}
		devErr = fmt.Errorf("create userfaultfd by %s: %w", Device, errno)
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	switch errno {
	case 0:
		return newFD(int(fd)), nil
	case unix.EPERM:
		if errors.Is(devErr, fs.ErrNotExist) {
			return nil, fmt.Errorf("create userfaultfd: %w; this kernel has no %s: run as root or set the sysctl vm.unprivileged_userfaultfd=1", ErrNotPermitted, Device)
		}
		return nil, fmt.Errorf("create userfaultfd: %w; grant access to %s (%w)", ErrNotPermitted, Device, devErr)
	default:
		return nil, fmt.Errorf("create userfaultfd: %w", errno)
	}
}

// FromFD takes over a descriptor that came from another process. It is closed
// when it is not a userfaultfd. One that blocks is made not to, as poll(2)
// reports an error for it otherwise (userfaultfd_poll in fs/userfaultfd.c).
func FromFD(fd int) (*FD, error) {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err == nil && !strings.Contains(name, "[userfaultfd]") {
		err = fmt.Errorf("it is %s", name)
	}
	if err == nil {
		unix.CloseOnExec(fd)
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		_ = syscall.Close(fd)
		return nil, fmt.Errorf("take over userfaultfd: %w", err)
	}
	return newFD(fd), nil
}
