//go:build linux

// Package merge starts programs whose memory the kernel may merge with that of
// others, page by page, where both hold the same (KSM, "kernel samepage merging").
//
// A process says so for itself, by prctl(2), and its children and the programs that
// they execute inherit it. So that it does not concern the caller, whose own memory would be
// merged as well, this program is executed once more in between: its main function
// calls [Main] first.
package merge

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// word is the name that this program has in between.
const word = "fcvm-merge"

// ErrUnavailable means that this kernel does not know it (before Linux 6.4, or
// without KSM), or that this user may not ask for it (CAP_SYS_RESOURCE).
var ErrUnavailable = errors.New("memory of other programs cannot be merged here")

// Main makes the process the program that [Command] was given, if it was started for
// that; else it returns at once.
func Main() {
	if os.Args[0] != word {
		return
	}
	err := mergeable()
	if err == nil {
		err = unix.Exec(os.Args[1], os.Args[2:], os.Environ())
	}
	fmt.Fprintf(os.Stderr, "start %s: %v\n", os.Args[1], err)
	os.Exit(125)
}

// mergeable sets it for this process (prctl(2), PR_SET_MEMORY_MERGE).
func mergeable() error {
	if err := unix.Prctl(unix.PR_SET_MEMORY_MERGE, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// Command changes cmd, which was not started, so that the kernel may merge the memory
// of its program. When that is not possible, the program is not executed: the process
// says why on its standard error, and ends.
func Command(cmd *exec.Cmd) {
	cmd.Args = append([]string{word, cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/self/exe"
}

// Runs tells whether the kernel looks for pages to merge at all. The error wraps
// [ErrUnavailable], and says what to do.
func Runs() error {
	const run = "/sys/kernel/mm/ksm/run"
	b, err := os.ReadFile(run)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if strings.TrimSpace(string(b)) != "1" {
		return fmt.Errorf("%w: the kernel merges nothing; `echo 1 > %s` starts it", ErrUnavailable, run)
	}
	return nil
}
