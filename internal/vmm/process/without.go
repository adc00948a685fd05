package process

import (
	"fmt"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// StartWithout starts cmd so that one system call does nothing in it, and says that it
// did. What it starts cannot gain privileges by a set-user-ID program.
//
// The filter is the starting thread's, and the child inherits it. The thread
// ends with its goroutine, because it stays locked, so that nothing else ever
// runs under the filter.
func StartWithout(cmd *exec.Cmd, syscall uint32) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		err := deny(syscall)
		if err == nil {
			err = cmd.Start()
		}
		done <- err
	}()
	return <-done
}

// deny installs the filter on the calling thread.
func deny(syscall uint32) error {
	// Offsets in struct seccomp_data (linux/seccomp.h): nr 0, arch 4.
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 4},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AUDIT_ARCH_X86_64, Jt: 0, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: syscall, Jt: 0, Jf: 1},
		// Errno 0: the call is skipped and returns 0.
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	prog := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(prog)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	return nil
}
