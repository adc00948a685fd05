//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"

	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/proto"
)

// command runs the command in the lab, and returns its exit code.
func (m *machine) command(ctx context.Context) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-m.ended:
			cancel(errors.New("the lab ended"))
		case <-ctx.Done():
		}
	}()
	defer func() {
		cancel(nil)
		<-watched
	}()
	c, err := agent.Connect(ctx, m.conn)
	if err != nil {
		return 0, fmt.Errorf("boot the lab: %w", err)
	}
	defer c.Close()
	wd, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	stopWatching := watch(ctx, c, patience, func() { cancel(errFrozen) })
	defer stopWatching()
	req := proto.ExecRequest{Args: m.options.command, Env: m.environ(os.Environ()), WorkDir: wd, User: "0", Stdin: true, TTY: m.tty}
	req.Rows, req.Cols = windowSize()
	s, err := c.Exec(ctx, req)
	if err != nil {
		return 0, fmt.Errorf("run the command in the lab: %w", err)
	}
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	frames := proto.NewFrameWriter(s)
	if m.tty {
		defer terminal(frames)()
	}
	// Nothing waits for it: a Read of a terminal can't be ended, and this program
	// ends with the command.
	go sendInput(frames)
	code, err := output(s)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return code, err
}

// errFrozen means that the lab itself stands still, whatever runs in it.
var errFrozen = fmt.Errorf("the lab is frozen: it has not answered for %v; QEMU loses interrupts of a processor that runs VMs now and then: run it again", patience)

const (
	// askEvery is how often the lab is asked whether it lives.
	askEvery = 2 * time.Second
	// patience is how long an answer may take, on a host that is busy as well.
	patience = time.Minute
)

// watch asks the lab's agent now and then, and calls frozen when it does not answer
// in time.
func watch(ctx context.Context, c *agent.Client, patience time.Duration, frozen func()) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(askEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			asked, done := context.WithTimeout(ctx, patience)
			_, err := c.Info(asked)
			done()
			if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
				frozen()
				return
			}
		}
	}()
	return func() { cancel(); <-ended }
}

// terminal makes keys reach the command as they are, and tells it of changes of
// size, until the returned function is called.
func terminal(frames *proto.FrameWriter) (restore func()) {
	state, err := term.MakeRaw(int(os.Stdin.Fd()))
	if err != nil {
		return func() {} // standard input is no terminal, and needs nothing
	}
	winch := make(chan os.Signal, 1)
	signal.Notify(winch, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range winch {
			_ = frames.Write(proto.FrameResize, proto.ResizePayload(windowSize())) // the command may have ended
		}
	}()
	return func() {
		signal.Stop(winch)
		close(winch)
		<-done
		_ = term.Restore(int(os.Stdin.Fd()), state) // there is nobody to tell
	}
}

func windowSize() (rows, cols uint16) {
	w, h, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil {
		return 0, 0 // the agent's default
	}
	return uint16(h), uint16(w)
}

func sendInput(frames *proto.FrameWriter) {
	buf := make([]byte, 32<<10)
	for {
		n, err := os.Stdin.Read(buf)
		if n > 0 && frames.Write(proto.FrameStdin, buf[:n]) != nil {
			return
		}
		if err != nil {
			_ = frames.Write(proto.FrameStdinEOF, nil) // the command may have ended
			return
		}
	}
}

// output prints what the command does, and returns its exit code.
func output(s io.Reader) (int, error) {
	buf := make([]byte, proto.MaxPayload)
	for {
		f, err := proto.ReadFrame(s, buf)
		if err != nil {
			return 0, fmt.Errorf("lost the lab: %w", err)
		}
		switch f.Type {
		case proto.FrameStdout:
			_, err = os.Stdout.Write(f.Payload)
		case proto.FrameStderr:
			_, err = os.Stderr.Write(f.Payload)
		case proto.FrameExit:
			return f.ExitCode()
		case proto.FrameError:
			return 0, f.Err()
		default: // nothing that concerns us
		}
		if err != nil {
			return 0, fmt.Errorf("write output: %w", err)
		}
	}
}
