package qemu

import (
	"fmt"
	"os/exec"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm/process"
)

// startKeepingFile starts QEMU so that fallocate(2) does nothing, and says that
// it did. Without ptrace QEMU itself maps the snapshot's memory file, and what
// the guest's balloon gives back is punched out of that file: out of the
// snapshot, under all its clones. With the hole denied, QEMU goes on to
// MADV_DONTNEED, which frees the clone's own copy, as it should. QEMU has no
// other use for fallocate here: its only drive is read-only.
func startKeepingFile(cmd *exec.Cmd) error {
	if err := process.StartWithout(cmd, unix.SYS_FALLOCATE); err != nil {
		return fmt.Errorf("protect memory file: %w", err)
	}
	return nil
}
