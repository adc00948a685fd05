//go:build linux

package main

import (
	"context"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
	"fcvm/internal/ui"
)

const execLong = `Run a command in a running VM.

Flags may stand on either side of the VM's name; from the command's first word
on, everything belongs to the command. Standard output and standard error stay
apart, unless -t gives the command a terminal. Signals are forwarded; the exit
code is the command's.`

type execOptions struct {
	env, envFiles    []string
	workdir, user    string
	interactive, tty bool
}

func newExec(a *app) *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use:               "exec [flags] VM [flags] COMMAND [ARG...]",
		Short:             "Run a command in a running VM",
		Long:              execLong,
		ValidArgsFunction: a.completeFirstVM,
	}
	f := cmd.Flags()
	f.BoolVarP(&o.interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
	f.StringArrayVarP(&o.env, "env", "e", nil, "set `NAME=value`, or take NAME from this environment")
	f.StringArrayVar(&o.envFiles, "env-file", nil, "read environment variables from `FILE`, one a line")
	f.StringVarP(&o.workdir, "workdir", "w", "", "working directory (default: the container's)")
	f.StringVarP(&o.user, "user", "u", "", "`USER[:GROUP]` by name or number (default: the container's)")
	bothSides(cmd)
	processFlags(cmd)
	cmd.RunE = asProcess(func(cmd *cobra.Command, args []string) error {
		vm, command, err := splitArgs(cmd, args, "VM")
		if err != nil {
			return err
		}
		if helpAsked(cmd) {
			return cmd.Help()
		}
		if len(command) == 0 {
			return &usageError{message: "missing command", command: cmd.CommandPath()}
		}
		return a.exec(cmd.Context(), o, vm, command)
	})
	return cmd
}

func (a *app) exec(ctx context.Context, o execOptions, vm string, command []string) error {
	env, err := parseEnv(o.envFiles, o.env, os.LookupEnv)
	if err != nil {
		return err
	}
	if o.interactive && o.tty && !ui.IsTerminal(a.in) {
		return invalid("-i and -t together need a terminal, and standard input is none")
	}
	req := api.ExecRequest{
		Command: command, Env: env, WorkDir: o.workdir, User: o.user, TTY: o.tty, Stdin: o.interactive,
	}
	if o.tty {
		req.Rows, req.Cols, _ = a.windowSize()
	}
	return a.withClient(ctx, func(c *api.Client) error {
		// The stream must outlive the context, which the first signal ends.
		sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		stop := context.AfterFunc(ctx, cancel)
		stream, err := c.Exec(sctx, vm, req)
		if !stop() || err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return err
		}
		s := a.startSession(stream, o.interactive, o.tty)
		defer s.close()
		a.intr.forward(a.toProcess(sctx, cancel, func(name string) error {
			return s.frames.Write(proto.FrameSignal, []byte(name))
		}))
		code, err := s.output(a.ui.Out, a.ui.Err)
		switch {
		case sctx.Err() != nil:
			return exitStatus(128 + int(syscall.SIGINT))
		case err != nil:
			return err
		case code != 0:
			return exitStatus(code)
		}
		return nil
	})
}

// signalName returns the name of a signal without SIG.
func signalName(s syscall.Signal) string { return strings.TrimPrefix(unix.SignalName(s), "SIG") }
