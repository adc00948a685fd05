//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
)

// maxReconnects bounds how often a supervisor may go away without anything new
// from the VM: a VM outlives supervisors, but one that dies again and again does
// not get better.
const maxReconnects = 3

// follow shows the output of a VM's process from its beginning, connects its
// input where it has one, and returns its exit code. When the supervisor goes
// away, the next one is asked for the rest.
func (a *app) follow(ctx context.Context, c *api.Client, vm api.VM) (int, error) {
	seen, failed := 0, 0
	for {
		before := seen
		exit, err := a.followOnce(ctx, c, vm, &seen)
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if err == nil {
			var end api.VM
			end, err = c.Wait(ctx, vm.ID)
			switch {
			case err == nil && end.Error != "":
				return 0, &api.Error{
					Code: api.CodeInternal, Message: fmt.Sprintf("VM %s ended: %s", vm.Name, end.Error),
					Hint: fmt.Sprintf("`fcvm inspect %s` says more", vm.Name),
				}
			case err == nil:
				return end.ExitCode, nil
			case exit != nil && isCode(err, api.CodeNotFound):
				// With --rm it is gone when the output was read slowly.
				return exit.ExitCode, nil
			}
		}
		if seen > before {
			failed = 0
		}
		away := errors.Is(err, errLogBroken) || isCode(err, api.CodeUnavailable)
		if failed++; failed > maxReconnects || !away {
			return 0, err
		}
		// The client reaches whoever listens on the socket.
		next, err := a.dial(ctx)
		if err != nil {
			return 0, err
		}
		_ = next.Close()
	}
}

// errLogBroken means that a log ended without an exit record, though its VM is
// followed: its supervisor went away.
var errLogBroken = errors.New("the supervisor went away")

// followOnce is follow with one supervisor. seen counts the log's records that
// were shown, which are skipped.
//
// The output comes from the log, not from the attached stream: what the process
// printed before anybody could attach is there, in order and once.
func (a *app) followOnce(ctx context.Context, c *api.Client, vm api.VM, seen *int) (*proto.LogRecord, error) {
	logs, err := c.Logs(ctx, vm.ID, api.LogsRequest{Follow: true, Tail: -1})
	if err != nil {
		return nil, err
	}
	defer logs.Close()
	if vm.OpenStdin || vm.TTY {
		stream, err := c.Attach(ctx, vm.ID)
		switch {
		case err == nil:
			s := a.startSession(stream, vm.OpenStdin, vm.TTY)
			defer s.close()
			s.discard()
		case isCode(err, api.CodeState) || isCode(err, api.CodeNotFound):
			// It has ended already, and the log says how.
		default:
			return nil, err
		}
	}
	before := *seen
	exit, err := copyLog(logs, a.ui.Out, a.ui.Err, seen)
	if err == nil && exit == nil {
		// A VM that was killed has no exit record either. Its log is complete when
		// asking again brought nothing new.
		if now, gerr := c.Get(ctx, vm.ID); gerr != nil || now.State != api.StateExited || *seen > before {
			err = errLogBroken
		}
	}
	return exit, err
}

// copyLog writes the records of a log to out and errs until it ends, but not the
// first *seen, and counts on. It returns the exit record, or nil when there was
// none.
func copyLog(r io.Reader, out, errs io.Writer, seen *int) (*proto.LogRecord, error) {
	lr := proto.NewLogReader(r)
	for n := 0; ; n++ {
		rec, err := lr.Next()
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: read log: %w", errLogBroken, err)
		}
		if n < *seen {
			continue
		}
		*seen++
		switch rec.Stream {
		case proto.Exit:
			rec.Data = nil
			return &rec, nil
		case proto.Stderr:
			_, err = errs.Write(rec.Data)
		default:
			_, err = out.Write(rec.Data)
		}
		if err != nil {
			return nil, fmt.Errorf("write output: %w", err)
		}
	}
}

// toProcess returns a signal handler that sends signals on, by their names. The
// third SIGINT gives up on the process: it is killed, and the fourth gives up on
// the VM.
func (a *app) toProcess(ctx context.Context, giveUp func(), send func(name string) error) func(os.Signal) {
	interrupts := 0
	return func(sig os.Signal) {
		s, ok := sig.(syscall.Signal)
		if !ok {
			return
		}
		name := signalName(s)
		if s == syscall.SIGINT {
			switch interrupts++; interrupts {
			case 1:
			case 2:
				a.ui.Note("fcvm: hint: press Ctrl-C once more to kill the process")
			case 3:
				name = "KILL"
			default:
				giveUp()
				return
			}
		}
		if err := send(name); err != nil && ctx.Err() == nil && !isCode(err, api.CodeState) && !isCode(err, api.CodeNotFound) {
			a.ui.Warn(fmt.Sprintf("send SIG%s: %v", name, err))
		}
	}
}
