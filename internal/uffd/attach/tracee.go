//go:build linux && amd64

package attach

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

var (
	// errProbed ends a probe: the process could be traced.
	errProbed = errors.New("probed")
	// errEnded means that the process is to be reaped.
	errEnded = errors.New("it ended before it mapped its memory")
)

// Codes of a siginfo for SIGCHLD (include/uapi/asm-generic/siginfo.h).
const (
	cldExited = 1
	cldKilled = 2
	cldDumped = 3
)

// tracee is the process while it is traced. It belongs to one locked thread.
type tracee struct {
	config        Config
	fileFD, devFD int // numbers in the process; -1 for none
	probe         bool

	pid int
	// held are signals that came while the process was borrowed for a system call.
	held []unix.Signal
}

// stop is why the process stopped.
type stop struct {
	signal  unix.Signal // that is about to be delivered, or 0
	syscall bool        // entry or exit of a system call
	event   int         // PTRACE_EVENT_*, or 0
}

// attach takes the process from its exec to where it runs freely with its memory
// replaced.
func (t *tracee) attach() (*Attached, error) {
	// exec stops a traced process with SIGTRAP before its first instruction.
	s, err := t.wait()
	for t.config.Wrapped && err == nil && s.signal != 0 && s.signal != unix.SIGTRAP {
		// A wrapper's own, on its way to exec: Go's runtime interrupts threads by one.
		if err = unix.PtraceCont(t.pid, int(s.signal)); err == nil {
			s, err = t.wait()
		} else {
			err = t.resumeError(err)
		}
	}
	if err != nil {
		return nil, err
	}
	if s.signal != unix.SIGTRAP {
		return nil, fmt.Errorf("expected it to stop at exec, not by %v", s.signal)
	}
	// EXITKILL: should this process end meanwhile, the VMM does not stay behind half made.
	const options = unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_TRACEEXEC
	if err := unix.PtraceSetOptions(t.pid, options); err != nil {
		return nil, fmt.Errorf("set ptrace options: %w", err)
	}
	if t.probe {
		if err := t.probeFetch(); err != nil {
			return nil, err
		}
		return nil, errProbed
	}
	if err := t.installFilter(); err != nil {
		return nil, err
	}
	if t.config.Own {
		return t.adopt()
	}
	return t.replace()
}

// wait waits for the next stop. It returns [errEnded] if the process ended, and
// leaves it to be reaped: until then nobody else gets its pid.
func (t *tracee) wait() (stop, error) {
	for {
		var si unix.Siginfo
		err := unix.Waitid(unix.P_PID, t.pid, &si, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT|unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return stop{}, fmt.Errorf("wait for process: %w", err)
		}
		if si.Code == cldExited || si.Code == cldKilled || si.Code == cldDumped {
			return stop{}, errEnded
		}
		break
	}
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(t.pid, &ws, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return stop{}, fmt.Errorf("wait for process: %w", err)
		}
		break
	}
	const syscallStop = unix.SIGTRAP | 0x80 // PTRACE_O_TRACESYSGOOD
	switch {
	case !ws.Stopped():
		// It was killed since it was seen to have stopped.
		return stop{}, fmt.Errorf("%w (wait status %#x)", errEnded, uint32(ws))
	case ws.StopSignal() == syscallStop:
		return stop{syscall: true}, nil
	case ws.StopSignal() == unix.SIGTRAP && uint32(ws)>>16 != 0:
		return stop{event: int(uint32(ws) >> 16)}, nil
	default:
		return stop{signal: ws.StopSignal()}, nil
	}
}

// toSyscall runs to the next entry or exit of a system call. While borrowed, the
// process has registers that are not its own, and a signal handler would save
// them: signals are held back then.
func (t *tracee) toSyscall(borrowed bool) error {
	var deliver unix.Signal
	for {
		if err := unix.PtraceSyscall(t.pid, int(deliver)); err != nil {
			return t.resumeError(err)
		}
		s, err := t.wait()
		if err != nil {
			return err
		}
		if s.syscall {
			return nil
		}
		deliver = s.signal
		if borrowed && deliver != 0 {
			t.held = append(t.held, deliver)
			deliver = 0
		}
	}
}

// toFiltered runs to the mmap that the filter lets stop.
func (t *tracee) toFiltered() error {
	deliver := t.heldBack()
	for {
		if err := unix.PtraceCont(t.pid, int(deliver)); err != nil {
			return t.resumeError(err)
		}
		s, err := t.wait()
		if err != nil {
			return err
		}
		if s.event == unix.PTRACE_EVENT_SECCOMP {
			return nil
		}
		deliver = s.signal
	}
}

// heldBack returns a signal that was held back, and sends the others again.
func (t *tracee) heldBack() unix.Signal {
	if len(t.held) == 0 {
		return 0
	}
	first, others := t.held[0], t.held[1:]
	t.held = nil
	for _, s := range others {
		_ = unix.Tgkill(t.pid, t.pid, s)
	}
	return first
}

// resumeError says why a stopped process could not be resumed: ESRCH means that it
// was killed while it was stopped, and the wait tells how.
func (t *tracee) resumeError(err error) error {
	if errors.Is(err, unix.ESRCH) {
		if _, werr := t.wait(); werr != nil {
			return werr
		}
	}
	return fmt.Errorf("resume process: %w", err)
}

func (t *tracee) regs() (unix.PtraceRegs, error) {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(t.pid, &r); err != nil {
		return r, t.resumeError(err)
	}
	return r, nil
}

func (t *tracee) setRegs(r unix.PtraceRegs) error {
	if err := unix.PtraceSetRegs(t.pid, &r); err != nil {
		return t.resumeError(err)
	}
	return nil
}

// inject has the process make a system call. It must stand at the exit of one,
// with registers at, and stands there again afterwards; the caller restores the
// registers when it is done. A negative result is an errno.
func (t *tracee) inject(at unix.PtraceRegs, number uint64, args ...uint64) (int64, error) {
	const syscallInsn = 2 // bytes of SYSCALL, 0f 05
	r := at
	r.Rip -= syscallInsn
	r.Rax = number
	// No system call that the kernel might take for interrupted, and restart.
	r.Orig_rax = ^uint64(0)
	var full [6]uint64
	copy(full[:], args)
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = full[0], full[1], full[2], full[3], full[4], full[5]
	if err := t.setRegs(r); err != nil {
		return 0, err
	}
	for range 2 { // entry, exit
		if err := t.toSyscall(true); err != nil {
			return 0, err
		}
	}
	r, err := t.regs()
	if err != nil {
		return 0, err
	}
	if r.Orig_rax != number {
		return 0, fmt.Errorf("borrowed process made system call %d instead of %d", int64(r.Orig_rax), number)
	}
	return int64(r.Rax), nil
}

// installFilter borrows the exit of the first system call.
func (t *tracee) installFilter() error {
	for range 2 {
		if err := t.toSyscall(false); err != nil {
			return err
		}
	}
	own, err := t.regs()
	if err != nil {
		return err
	}
	insn := make([]byte, 2)
	if _, err := unix.PtracePeekText(t.pid, uintptr(own.Rip-2), insn); err != nil {
		return fmt.Errorf("read code: %w", err)
	}
	if insn[0] != 0x0f || insn[1] != 0x05 {
		return fmt.Errorf("it is not an x86-64 program: system call by % x", insn)
	}
	// Far enough below the stack pointer that nothing lives there, and well within
	// what exec sets up (32 pages and more).
	addr := (own.Rsp - 8192) &^ 15
	p := filter(uint64(t.config.Size))
	if t.config.Own {
		if p = ownFilter(); t.config.StandIn != nil {
			p = skipping(unix.SYS_CLOSE_RANGE, p)
		}
	}
	prog := program(p, addr)
	if _, err := unix.PtracePokeData(t.pid, uintptr(addr), prog); err != nil {
		return fmt.Errorf("write filter: %w", err)
	}
	for _, c := range []struct {
		name string
		must bool
		nr   uint64
		args []uint64
	}{
		// The kernel wants the unused arguments to be zero.
		{"set no_new_privs", true, unix.SYS_PRCTL, []uint64{unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0}},
		// khugepaged of Linux before 6.4 fills holes of a shared file when it makes
		// a huge page of it: every clone would then read zeros there. QEMU asks for
		// huge pages (MADV_HUGEPAGE), which is all it takes with shmem_enabled=advise.
		{"switch off huge pages", false, unix.SYS_PRCTL, []uint64{unix.PR_SET_THP_DISABLE, 1, 0, 0, 0}},
		{"install seccomp filter", true, unix.SYS_SECCOMP, []uint64{unix.SECCOMP_SET_MODE_FILTER, 0, addr}},
	} {
		res, err := t.inject(own, c.nr, c.args...)
		if err != nil {
			return err
		}
		if res < 0 && c.must {
			return fmt.Errorf("%s: %w", c.name, unix.Errno(-res))
		}
	}
	return t.setRegs(own)
}

// replace waits for the mmap, changes it, and puts the userfaultfd on it.
func (t *tracee) replace() (*Attached, error) {
	if err := t.toFiltered(); err != nil {
		return nil, err
	}
	asked, err := t.regs()
	if err != nil {
		return nil, err
	}
	if asked.Orig_rax != unix.SYS_MMAP || asked.Rsi != uint64(t.config.Size) {
		return nil, fmt.Errorf("stopped at system call %d instead of mmap", int64(asked.Orig_rax))
	}
	r := asked
	r.R10, r.R8, r.R9 = newFlags, uint64(t.fileFD), 0
	if err := t.setRegs(r); err != nil {
		return nil, err
	}
	if err := t.toSyscall(false); err != nil { // its exit
		return nil, err
	}
	own, err := t.regs()
	if err != nil {
		return nil, err
	}
	if e := int64(own.Rax); e < 0 && e > -4096 {
		return nil, fmt.Errorf("map %s as its memory: %w", t.config.File.Name(), unix.Errno(-e))
	}
	own.R10, own.R8, own.R9 = asked.R10, asked.R8, asked.R9
	return t.finish(own, []Piece{{Addr: own.Rax, Size: uint64(t.config.Size)}})
}

// adopt waits until the VMM has mapped all of the file.
func (t *tracee) adopt() (*Attached, error) {
	var pieces []Piece
	for left := uint64(t.config.Size); ; {
		if err := t.toFiltered(); err != nil {
			return nil, err
		}
		asked, err := t.regs()
		if err != nil {
			return nil, err
		}
		if same, err := t.isFile(asked.R8); err != nil {
			return nil, err
		} else if !same {
			continue
		}
		if t.config.StandIn != nil {
			r := asked
			r.R8 = uint64(t.fileFD)
			if err := t.setRegs(r); err != nil {
				return nil, err
			}
		}
		if err := t.toSyscall(false); err != nil { // its exit
			return nil, err
		}
		own, err := t.regs()
		if err != nil {
			return nil, err
		}
		own.R8 = asked.R8
		if e := int64(own.Rax); e < 0 && e > -4096 {
			return nil, fmt.Errorf("map %s as its memory: %w", t.config.File.Name(), unix.Errno(-e))
		}
		if asked.Rsi > left {
			return nil, fmt.Errorf("it maps more of %s than %d bytes: the guest has more memory than its snapshot", t.config.File.Name(), t.config.Size)
		}
		pieces = append(pieces, Piece{Addr: own.Rax, Size: asked.Rsi, Offset: asked.R9})
		if left -= asked.Rsi; left == 0 {
			return t.finish(own, pieces)
		}
		if t.config.StandIn != nil {
			if err := t.setRegs(own); err != nil {
				return nil, err
			}
		}
	}
}

// isFile tells whether a descriptor of the process is of the file, or of what stands
// in for it, however it was opened.
func (t *tracee) isFile(fd uint64) (bool, error) {
	file := t.config.File
	if t.config.StandIn != nil {
		file = t.config.StandIn
	}
	var have, want unix.Stat_t
	// The kernel takes an int.
	if err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", t.pid, int32(fd)), &have); err != nil {
		return false, fmt.Errorf("look at what it maps: %w", err)
	}
	if err := unix.Fstat(int(file.Fd()), &want); err != nil {
		return false, fmt.Errorf("look at %s: %w", file.Name(), err)
	}
	return have.Dev == want.Dev && have.Ino == want.Ino, nil
}

// finish lets go of the process, which stands at the exit of an mmap with
// registers own.
func (t *tracee) finish(own unix.PtraceRegs, pieces []Piece) (_ *Attached, err error) {
	a := &Attached{Addr: pieces[0].Addr, Pieces: pieces}
	if t.config.Userfault {
		if a.UFFD, err = t.userfault(own, pieces); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				a.UFFD.Close()
			}
		}()
	}
	// A VMM has no use for these; without them it can reach less.
	for _, fd := range []int{t.fileFD, t.devFD} {
		if fd < 0 {
			continue
		}
		if _, err := t.inject(own, unix.SYS_CLOSE, uint64(fd)); err != nil {
			return nil, err
		}
	}
	if err := t.setRegs(own); err != nil {
		return nil, err
	}
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(t.pid), 0, uintptr(t.heldBack()), 0, 0); errno != 0 {
		return nil, t.resumeError(errno)
	}
	return a, nil
}

// userfault creates a userfaultfd in the process, fetches it and puts it on the
// mapping.
func (t *tracee) userfault(own unix.PtraceRegs, pieces []Piece) (_ *uffd.FD, err error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	fd := int64(-int(unix.ENODEV))
	if t.devFD >= 0 {
		if fd, err = t.inject(own, unix.SYS_IOCTL, uint64(t.devFD), uffd.NewRequest, flags); err != nil {
			return nil, err
		}
	}
	if fd < 0 {
		if fd, err = t.inject(own, unix.SYS_USERFAULTFD, flags); err != nil {
			return nil, err
		}
	}
	if fd < 0 {
		errno := unix.Errno(-fd)
		if errno == unix.EPERM {
			return nil, fmt.Errorf("create userfaultfd: %w; grant access to %s", uffd.ErrNotPermitted, uffd.Device)
		}
		return nil, fmt.Errorf("create userfaultfd: %w", errno)
	}
	got, err := t.fetch(int(fd))
	if err != nil {
		return nil, err
	}
	u, err := uffd.FromFD(got)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			u.Close()
		}
	}()
	// Both act on the memory of the process that created it. REMOVE tells of
	// pages that the guest's balloon gave back.
	if _, err := u.API(uffd.FeatureEventRemove); err != nil {
		return nil, err
	}
	for _, p := range pieces {
		can, err := u.Register(p.Addr, p.Size, uffd.ModeMissing)
		if err != nil {
			return nil, err
		}
		if need := uffd.CanCopy | uffd.CanWake | uffd.CanZeroPage; can&need != need {
			return nil, fmt.Errorf("this kernel cannot fill a private mapping of %s (%#x)", t.config.File.Name(), can)
		}
	}
	return u, nil
}

// fetch duplicates a descriptor of the process.
func (t *tracee) fetch(fd int) (int, error) {
	pidfd, err := unix.PidfdOpen(t.pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open pidfd: %w", err)
	}
	defer unix.Close(pidfd)
	got, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err == unix.EPERM || err == unix.ENOSYS {
		return -1, fmt.Errorf("%w: fetch descriptor (pidfd_getfd, Linux 5.6): %w", ErrForbidden, err)
	}
	if err != nil {
		return -1, fmt.Errorf("fetch descriptor: %w", err)
	}
	return got, nil
}

// probeFetch tries what fetch needs, on standard input.
func (t *tracee) probeFetch() error {
	fd, err := t.fetch(0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}
