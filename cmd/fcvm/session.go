//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/term"

	"fcvm/internal/guest/proto"
	"fcvm/internal/ui"
)

// session connects this program's standard input and terminal to a process's
// stream of frames.
type session struct {
	a      *app
	stream io.ReadWriteCloser
	frames *proto.FrameWriter
	// restore puts the terminal back.
	restore func()
	input   *interruptible
	winch   chan os.Signal
	wg      sync.WaitGroup
}

// startSession begins to send input (with stdin) and window sizes (with tty).
// With both, a terminal at standard input becomes raw: keys reach the process as
// they are, Ctrl-C too. Call close in any case.
func (a *app) startSession(stream io.ReadWriteCloser, stdin, tty bool) *session {
	s := &session{a: a, stream: stream, frames: proto.NewFrameWriter(stream), restore: func() {}, winch: make(chan os.Signal, 1)}
	if tty {
		signal.Notify(s.winch, syscall.SIGWINCH)
		s.wg.Go(s.resize)
	}
	if !stdin {
		return s
	}
	if tty && ui.IsTerminal(a.in) {
		if state, err := term.MakeRaw(int(a.in.Fd())); err == nil {
			s.restore = func() { _ = term.Restore(int(a.in.Fd()), state) }
		}
	}
	in, err := newInterruptible(a.in)
	if err != nil {
		a.ui.Warn(fmt.Sprintf("standard input is not connected: %v", err))
		return s
	}
	s.input = in
	s.wg.Go(s.send)
	return s
}

// send copies standard input to the process until either ends.
func (s *session) send() {
	buf := make([]byte, 32<<10)
	for {
		n, err := s.input.Read(buf)
		if n > 0 && s.frames.Write(proto.FrameStdin, buf[:n]) != nil {
			return
		}
		switch {
		case err == nil:
		case errors.Is(err, os.ErrClosed):
			return
		default:
			// An error of reading ends the input like its end.
			_ = s.frames.Write(proto.FrameStdinEOF, nil)
			return
		}
	}
}

// resize tells the process how large the terminal is, now and when it changes.
func (s *session) resize() {
	for {
		if rows, cols, ok := s.a.windowSize(); ok {
			if s.frames.Write(proto.FrameResize, proto.ResizePayload(rows, cols)) != nil {
				return
			}
		}
		if _, ok := <-s.winch; !ok {
			return
		}
	}
}

// discard reads frames and drops them, in the background, so that the other side
// never waits.
func (s *session) discard() {
	s.wg.Go(func() { _, _ = io.Copy(io.Discard, s.stream) })
}

// output writes the process's output until it ends, and returns its exit code.
func (s *session) output(out, errs io.Writer) (int, error) {
	buf := make([]byte, proto.MaxPayload)
	for {
		f, err := proto.ReadFrame(s.stream, buf)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = errors.New("the VM ended, or the supervisor did")
			}
			return 0, fmt.Errorf("lost the process: %w", err)
		}
		switch f.Type {
		case proto.FrameStdout:
			_, err = out.Write(f.Payload)
		case proto.FrameStderr:
			_, err = errs.Write(f.Payload)
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

// close ends the session and puts the terminal back. The process runs on.
func (s *session) close() {
	if s.input != nil {
		s.input.interrupt()
	}
	signal.Stop(s.winch)
	close(s.winch)
	_ = s.stream.Close()
	s.wg.Wait()
	if s.input != nil {
		s.input.close()
	}
	s.restore()
}

// windowSize returns the size of the terminal at standard output, or input.
func (a *app) windowSize() (rows, cols uint16, ok bool) {
	for _, f := range []any{a.ui.Out, a.in} {
		file, isFile := f.(*os.File)
		if !isFile {
			continue
		}
		if w, h, err := term.GetSize(int(file.Fd())); err == nil && w > 0 && h > 0 {
			return uint16(min(h, 1<<16-1)), uint16(min(w, 1<<16-1)), true
		}
	}
	return 0, 0, false
}
