package qemu

import (
	"fmt"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// startKeepingFile starts QEMU so that fallocate(2) does nothing, and says that
// it did. Without ptrace QEMU itself maps the snapshot's memory file, and what
// the guest's balloon gives back is punched out of that file: out of the
// snapshot, under all its clones. With the hole denied, QEMU goes on to
// MADV_DONTNEED, which frees the clone's own copy, as it should. QEMU has no
// other use for fallocate here: its only drive is read-only.
//
// The filter is the starting thread's, and the child inherits it. The thread
// ends with its goroutine, because it stays locked, so that nothing else ever
// runs under the filter.
func startKeepingFile(cmd *exec.Cmd) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		err := denyFallocate()
		if err == nil {
			err = startPlain(cmd)
		}
		done <- err
	}()
	return <-done
}

// denyFallocate installs the filter on the calling thread.
func denyFallocate() error {
	// Offsets in struct seccomp_data (linux/seccomp.h): nr 0, arch 4.
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 4},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AUDIT_ARCH_X86_64, Jt: 0, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FALLOCATE, Jt: 0, Jf: 1},
		// Errno 0: the call is skipped and returns 0.
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("protect memory file: %w", err)
	}
	prog := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(prog)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("protect memory file: install seccomp filter: %w", errno)
	}
	return nil
}
