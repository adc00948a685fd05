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

// follow shows the output of a VM's process from its beginning, connects its
// input where it has one, and returns its exit code.
//
// The output comes from the log, not from the attached stream: what the process
// printed before anybody could attach is there, in order and once.
func (a *app) follow(ctx context.Context, c *api.Client, vm api.VM) (int, error) {
	logs, err := c.Logs(ctx, vm.ID, api.LogsRequest{Follow: true, Tail: -1})
	if err != nil {
		return 0, err
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
			return 0, err
		}
	}
	exit, err := copyLog(logs, a.ui.Out, a.ui.Err)
	if err != nil && ctx.Err() == nil {
		return 0, err
	}
	end, err := c.Wait(ctx, vm.ID)
	switch {
	case exit != nil && isCode(err, api.CodeNotFound):
		// With --rm it is gone when the output was read slowly.
		return exit.ExitCode, nil
	case err != nil:
		return 0, err
	case end.Error != "":
		return 0, &api.Error{
			Code: api.CodeInternal, Message: fmt.Sprintf("VM %s ended: %s", vm.Name, end.Error),
			Hint: fmt.Sprintf("`fcvm inspect %s` says more", vm.Name),
		}
	}
	return end.ExitCode, nil
}

// copyLog writes the records of a log to out and errs until it ends. It returns
// the exit record, or nil when there was none.
func copyLog(r io.Reader, out, errs io.Writer) (*proto.LogRecord, error) {
	for lr := proto.NewLogReader(r); ; {
		rec, err := lr.Next()
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
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
