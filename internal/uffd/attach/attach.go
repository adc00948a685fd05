//go:build linux && amd64

package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// ErrForbidden means that processes cannot be traced here (Yama, a seccomp filter
// of a container), or that their descriptors cannot be fetched.
var ErrForbidden = errors.New("ptrace is not allowed here")

// Config says which mapping is replaced, and by what.
type Config struct {
	// Size of the guest's memory in bytes. The first mmap of exactly this size
	// that is PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_FIXED is the one
	// (QEMU 7.2: qemu_ram_mmap of memory-backend-ram, over a PROT_NONE reservation).
	Size int64
	// File is mapped instead, from its start. It may be open read-only. The
	// caller keeps it; the VMM's copy is closed once it is mapped.
	File *os.File
	// Own says that the VMM maps File itself, privately, in one or several pieces,
	// as Firecracker does when it loads a snapshot. Nothing is exchanged then: what
	// it maps of File (by device and inode, whatever path it opened) gets the
	// userfaultfd as soon as it holds Size bytes. Until then the VMM may run for
	// long; somebody else tells it to load. File is not handed to the VMM.
	Own bool
	// Wrapped says that cmd is a wrapper, which calls [TraceMe] right before it executes
	// the VMM, and is not traced until then.
	Wrapped bool
	// StandIn, with Own, is a file of the same size that the VMM maps because it cannot
	// open File: it is jailed. What it maps of StandIn is mapped of File instead, which
	// is handed to it for that. And close_range(2) does nothing in it, so that the jailer
	// leaves it what it inherited.
	StandIn *os.File
	// Userfault asks for a userfaultfd over the mapping. File must then be shared
	// memory (tmpfs, memfd): the kernel has none for other files.
	Userfault bool
}

// Attached is the outcome. The caller owns UFFD.
type Attached struct {
	// UFFD reports REMOVE besides faults; nil without Config.Userfault.
	UFFD *uffd.FD
	// Addr is where the VMM mapped the file: its first piece.
	Addr uint64
	// Pieces are all of them, in the order in which they were mapped.
	Pieces []Piece
}

// Piece is a part of the file in the VMM's address space, in bytes.
type Piece struct{ Addr, Size, Offset uint64 }

// Start starts cmd and returns when its memory was replaced and it runs freely.
// Files that the VMM needs for it are appended to cmd.ExtraFiles, behind those
// that are there.
//
// When it fails, or ctx ends first, the process is gone, has been waited for, and
// cmd.Wait must not be called. The error wraps [ErrForbidden] where tracing is
// not allowed, and [uffd.ErrNotPermitted] where userfaultfd is not. Signals that arrive meanwhile are delivered.
func Start(ctx context.Context, cmd *exec.Cmd, c Config) (*Attached, error) {
	if c.Size <= 0 || c.Size%int64(os.Getpagesize()) != 0 {
		return nil, fmt.Errorf("attach to %s: memory of %d bytes is not whole pages", cmd.Path, c.Size)
	}
	extra := cmd.ExtraFiles
	defer func() { cmd.ExtraFiles = extra }()

	t := &tracee{config: c, fileFD: -1, devFD: -1}
	if !c.Own || c.StandIn != nil {
		t.fileFD = inherit(cmd, c.File)
	}
	if c.Userfault {
		// The device, where it may be opened, also serves users whom the system
		// call is closed to. It works through any descriptor, so the VMM needs no
		// permission of its own.
		if dev, err := uffd.OpenDevice(); err == nil {
			defer dev.Close()
			t.devFD = inherit(cmd, dev)
		}
	}
	a, err := run(ctx, cmd, t)
	if err != nil {
		return nil, fmt.Errorf("attach to %s: %w", cmd.Path, err)
	}
	return a, nil
}

// exitForbidden is the exit code of a wrapper that cannot be traced.
const exitForbidden = 113

// TraceMe is for a wrapper ([Config].Wrapped): its parent traces the calling thread, which
// stops once it executes the VMM. It must be the process's first thread. Where tracing is not
// allowed, it ends the process.
func TraceMe() error {
	_, _, errno := unix.RawSyscall(unix.SYS_PTRACE, unix.PTRACE_TRACEME, 0, 0)
	if errno == unix.EPERM {
		os.Exit(exitForbidden)
	}
	if errno != 0 {
		return fmt.Errorf("ask to be traced: %w", errno)
	}
	return nil
}

// inherit appends f and returns the number that it will have in the child.
func inherit(cmd *exec.Cmd, f *os.File) int {
	cmd.ExtraFiles = append(cmd.ExtraFiles[:len(cmd.ExtraFiles):len(cmd.ExtraFiles)], f)
	return 2 + len(cmd.ExtraFiles)
}

// run does the tracing on a thread of its own, because ptrace answers only the
// thread that started the process.
func run(ctx context.Context, cmd *exec.Cmd, t *tracee) (*Attached, error) {
	type outcome struct {
		a   *Attached
		err error
	}
	result := make(chan outcome, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		a, err := trace(ctx, cmd, t)
		result <- outcome{a, err}
	}()
	o := <-result
	return o.a, o.err
}

func trace(ctx context.Context, cmd *exec.Cmd, t *tracee) (_ *Attached, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	attr := unix.SysProcAttr{}
	if cmd.SysProcAttr != nil {
		attr = *cmd.SysProcAttr
	}
	given := cmd.SysProcAttr
	attr.Ptrace = !t.config.Wrapped
	cmd.SysProcAttr = &attr
	defer func() { cmd.SysProcAttr = given }()
	if err := cmd.Start(); err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("%w: %w", ErrForbidden, err)
		}
		return nil, err
	}
	t.pid = cmd.Process.Pid

	// Ends the process when ctx does: the wait below then returns. It goes by
	// pidfd (os.Process), so that it cannot hit somebody else.
	watch, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		<-watch.Done()
		if ctx.Err() != nil {
			_ = cmd.Process.Kill()
		}
	}()
	a, err := t.attach()
	stop()
	<-watched
	if err == nil && ctx.Err() != nil {
		// It was killed, or is about to be missed by its caller.
		if a.UFFD != nil {
			a.UFFD.Close()
		}
		err = ctx.Err()
	}
	if err == nil {
		return a, nil
	}
	// Leave no process behind. Wait also ends the goroutines of cmd.
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if t.config.Wrapped && cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == exitForbidden {
		return nil, fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	if errors.Is(err, errEnded) && cmd.ProcessState != nil {
		err = fmt.Errorf("%w: %s", err, cmd.ProcessState)
	}
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w (%w)", ctx.Err(), err)
	}
	return nil, err
}

// Probe tells whether [Start] can work here. It starts a copy of this program
// traced, and ends it before its first instruction. It returns nil or an error
// that wraps [ErrForbidden].
func Probe() error {
	cmd := exec.Command("/proc/self/exe")
	t := &tracee{probe: true, devFD: -1}
	if _, err := run(context.Background(), cmd, t); !errors.Is(err, errProbed) {
		return fmt.Errorf("probe ptrace: %w", err)
	}
	return nil
}
