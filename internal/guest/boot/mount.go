package boot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	rootDevice = "/dev/vda"
	lower      = "/lower"
	writable   = "/writable"
	newRoot    = "/newroot"
)

// Mount is what mount(2) is told.
type Mount struct {
	Source, Target, Type string
	Flags                uintptr
	Data                 string
}

// Do mounts it, and makes its Target where that is missing.
func (m Mount) Do() error {
	if err := os.MkdirAll(m.Target, 0o755); err != nil {
		return fmt.Errorf("mount %s: %w", m.Target, err)
	}
	if err := unix.Mount(m.Source, m.Target, m.Type, m.Flags, m.Data); err != nil {
		return fmt.Errorf("mount %s: %w", m.Target, err)
	}
	return nil
}

const safe = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

// mountFirst mounts what loading modules needs.
func mountFirst() error {
	for _, m := range []Mount{
		{"proc", "/proc", "proc", safe, ""},
		{"sysfs", "/sys", "sysfs", safe, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
	} {
		if err := m.Do(); err != nil && !errors.Is(err, unix.EBUSY) { // the kernel may have
			return err
		}
	}
	return nil
}

// enterRoot makes the container's root: the image, read-only, under a layer in
// memory; and changes into it for good. /run and /tmp are the image's, as in docker:
// they are in memory anyway.
func enterRoot(root Mount) error {
	root.Target = lower
	root.Flags |= unix.MS_RDONLY
	for _, m := range []Mount{
		root,
		// The rest of the memory is for processes.
		{"tmpfs", writable, "tmpfs", 0, "mode=0755,size=75%"},
	} {
		if err := m.Do(); err != nil {
			return err
		}
	}
	for _, d := range []string{"/upper", "/work"} {
		if err := os.Mkdir(writable+d, 0o755); err != nil {
			return fmt.Errorf("make writable layer: %w", err)
		}
	}
	data := "lowerdir=" + lower + ",upperdir=" + writable + "/upper,workdir=" + writable + "/work"
	if err := (Mount{"overlay", newRoot, "overlay", 0, data}).Do(); err != nil {
		return err
	}
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		if err := (Mount{d, newRoot + d, "", unix.MS_MOVE, ""}).Do(); err != nil {
			return err
		}
	}
	// What lies in the initramfs is memory; the modules are loaded.
	for _, p := range []string{"/modules", "/init", "/root"} {
		os.RemoveAll(p)
	}
	if err := unix.Chdir(newRoot); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	return mountRest()
}

func mountRest() error {
	for _, m := range []Mount{
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", safe, "mode=1777"},
	} {
		if err := m.Do(); err != nil {
			return err
		}
	}
	// Programs look here for their limits; no cgroup is no error.
	_ = (Mount{"cgroup2", "/sys/fs/cgroup", "cgroup2", safe, ""}).Do()
	for name, target := range map[string]string{
		"/dev/fd":     "/proc/self/fd",
		"/dev/stdin":  "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make %s: %w", name, err)
		}
	}
	if err := os.MkdirAll("/tmp", 0o1777); err != nil {
		return fmt.Errorf("make /tmp: %w", err)
	}
	return nil
}
