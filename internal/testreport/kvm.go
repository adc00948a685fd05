package testreport

import (
	"os"
	"path/filepath"
	"strconv"
)

// UsesKVM tells whether a process holds a VM of KVM's, by the name that the kernel
// gives its descriptor (virt/kvm/kvm_main.c). The error is that of a process that has
// ended, or is another user's.
func UsesKVM(pid int) (bool, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, fd := range fds {
		// It may have been closed since.
		if target, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && target == "anon_inode:kvm-vm" {
			return true, nil
		}
	}
	return false, nil
}
