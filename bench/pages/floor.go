//go:build linux

package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"fcvm/internal/pageserver/pstest"
)

//go:embed floor/loop.c
var loopSource []byte

// compileLoop makes the floor's program. The error wraps [exec.ErrNotFound] where
// there is no compiler.
func compileLoop(ctx context.Context, dir string) (string, error) {
	source, program := filepath.Join(dir, "loop.c"), filepath.Join(dir, "loop")
	if err := os.WriteFile(source, loopSource, 0o600); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "gcc", "-O2", "-pthread", "-o", program, source).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("compile the floor: %w: %s", err, out)
	}
	return program, nil
}

// loop is the floor's program, running.
type loop struct {
	cmd         *exec.Cmd
	dir, socket string
	said        bytes.Buffer // read after the end
}

// startLoop starts it; mapped has it read nothing, but hold the whole file in memory.
func startLoop(ctx context.Context, program, dir, memory string, mapped bool) (*loop, error) {
	dir, err := os.MkdirTemp(dir, "loop")
	if err != nil {
		return nil, err
	}
	l := &loop{dir: dir, socket: filepath.Join(dir, "s")}
	args := []string{l.socket, memory}
	if mapped {
		args = append(args, "mapped")
	}
	l.cmd = exec.CommandContext(ctx, program, args...)
	l.cmd.Stderr = &l.said
	// As the page server: where the kernel groups processes by session (sched(7),
	// autogroup), both have the same share of the processors.
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := l.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	for try := 0; ; try++ {
		if _, err := os.Lstat(l.socket); err == nil {
			return l, nil
		}
		if try == 5000 {
			return nil, errors.Join(errors.New("the C loop does not listen"), l.stop())
		}
		time.Sleep(time.Millisecond)
	}
}

func (l *loop) shape() pstest.Shape { return pstest.Anonymous }
func (l *loop) template() *os.File  { return nil }
func (l *loop) handshake() string   { return l.socket }
func (l *loop) pid() int            { return l.cmd.Process.Pid }

// faults are not counted by it: each access is one.
func (l *loop) faults(context.Context) (uint64, error) { return 0, nil }
func (l *loop) settle(context.Context) error           { return nil }

func (l *loop) stop() error {
	_ = l.cmd.Process.Kill()
	_ = l.cmd.Wait() // "signal: killed", or else it says why
	_ = os.RemoveAll(l.dir)
	if l.said.Len() > 0 {
		return fmt.Errorf("C loop: %s", bytes.TrimSpace(l.said.Bytes()))
	}
	return nil
}
