//go:build linux

package tapnet

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd/attach"
)

// RunEnter is the command [Enter]: it makes the TAP, and becomes the VMM. It returns an
// error, or not at all. The calling goroutine must be the program's main one, locked to its thread
// since the program began: it is that thread that a parent can trace.
func RunEnter(args []string) error {
	fs := flag.NewFlagSet(Enter, flag.ContinueOnError)
	link := fs.Int(flagLink, -1, "")
	trace := fs.Bool(flagTrace, false, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() == 0 || *link < 0 {
		return errors.New("this command is for fcvm itself")
	}
	parent := os.Getppid()
	if err := makeTAP(); err != nil {
		return err
	}
	if err := sendLink(*link); err != nil {
		return fmt.Errorf("hand over the TAP: %w", err)
	}
	if os.Geteuid() != 0 {
		// The VMM needs no more than its user may.
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
	}
	if *trace {
		// Whoever adopts an orphan would not know what to do with it.
		if os.Getppid() != parent {
			return errors.New("the supervisor has ended")
		}
		if err := attach.TraceMe(); err != nil {
			return err
		}
	}
	return fmt.Errorf("execute %s: %w", fs.Arg(0), syscall.Exec(fs.Arg(0), fs.Args(), os.Environ()))
}

// sendLink sends a packet socket on the TAP and a pidfd of this process, which will
// be the VMM's.
func sendLink(link int) error {
	unix.CloseOnExec(link)
	packets, err := Packets(Device)
	if err != nil {
		return err
	}
	defer packets.Close()
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fmt.Errorf("open pidfd: %w", err)
	}
	defer unix.Close(pidfd)
	if err := unix.Sendmsg(link, []byte{0}, unix.UnixRights(int(packets.Fd()), pidfd), nil, 0); err != nil {
		return err
	}
	return unix.Close(link)
}
