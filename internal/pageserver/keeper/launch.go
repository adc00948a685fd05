//go:build linux

package keeper

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver"
	"fcvm/internal/vmm"
	vmmprocess "fcvm/internal/vmm/process"
)

const (
	// LogName is the log of the page servers, in Config.Dir.
	LogName = "uffd_handler.log"
	// Descriptors of a launched page server.
	templateFD = 3
	readyFD    = 4
	controlFD  = 5
)

// process is one page server: it runs in a session of its own, and outlives the
// process that started it.
type process struct {
	*vmmprocess.Process
	client *pageserver.Client
	cmd    *exec.Cmd // nil when adopted
	log    string
	said   int64 // size of the log when it was started
}

// launch starts a page server, and returns when it answers. When it fails, or ctx
// ends first, nothing is left behind but the log.
func launch(ctx context.Context, c *Config, template *os.File, used bool) (_ *process, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("launch page server: %w", err)
		}
	}()
	logPath := filepath.Join(c.Dir, LogName)
	log, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	said, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	// Listening here, it need not make a file where it can't, and there is no
	// moment at which nobody listens.
	control, err := pageserver.Listen(ctx, c.control(), 0o600)
	if err != nil {
		return nil, err
	}
	control.SetUnlinkOnClose(false)
	defer control.Close()
	controlFile, err := control.File()
	if err != nil {
		return nil, err
	}
	defer controlFile.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()

	cmd := exec.Command(c.Binary, c.args(used)...)
	// A supervisor finds what an earlier one left by the directory on its command line.
	cmd.Args[0] = filepath.Join(c.Runtime, filepath.Base(c.Binary))
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = append([]*os.File{template, w, controlFile}, c.Inherit...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	w.Close()
	proc, err := vmmprocess.Started(cmd)
	if errors.Is(err, vmmprocess.ErrGone) { // it has ended already, and says why
		return nil, endedBy(cmd, logPath, said)
	}
	if err != nil {
		return nil, err
	}
	p := &process{Process: proc, cmd: cmd, log: logPath, said: said}
	if err = p.awaitReady(ctx, r); err == nil {
		p.client, err = pageserver.Dial(ctx, c.control())
	}
	if err != nil {
		p.end()
		return nil, err
	}
	return p, nil
}

// args is the page server's command line.
func (c *Config) args(used bool) []string {
	args := []string{
		"-", c.MemFile, "--policy", string(c.Policy), "--template", fdPath(templateFD),
		"--control", fdPath(controlFD), "--ready-fd", strconv.Itoa(readyFD),
	}
	if used {
		args = append(args, "--template-used")
	}
	if c.PageSums != "" {
		args = append(args, "--page-sums", c.PageSums)
	}
	if c.WorkingSet != "" {
		args = append(args, "--working-set", c.WorkingSet, "--id", hex.EncodeToString(c.ID[:]))
	}
	if c.Fill.BytesPerSecond > 0 {
		args = append(args, "--fill", strconv.FormatInt(c.Fill.BytesPerSecond, 10), "--fill-max", strconv.FormatInt(c.Fill.MaxBytes, 10))
	}
	if c.IdleTimeout != "" {
		args = append(args, "--idle-timeout", c.IdleTimeout)
	}
	return args
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// adopt takes over a page server that another process launched.
func adopt(ctx context.Context, h Handle) (*process, error) {
	proc, err := vmmprocess.Adopt(h.PID, h.StartTime)
	if errors.Is(err, vmmprocess.ErrGone) {
		return nil, fmt.Errorf("%w: %w", vmm.ErrGone, err)
	}
	if err != nil {
		return nil, err
	}
	p := &process{Process: proc, log: filepath.Join(h.Config.Dir, LogName)}
	if p.client, err = pageserver.Dial(ctx, h.Config.control()); err != nil {
		_ = proc.Release()
		return nil, err
	}
	return p, nil
}

// awaitReady reads the line that says so. The pipe ends when the process does.
func (p *process) awaitReady(ctx context.Context, r *os.File) error {
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	line, err := io.ReadAll(io.LimitReader(r, int64(len(pageserver.ReadyLine))))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case string(line) != pageserver.ReadyLine:
		<-p.Done()
		return p.err()
	}
	return nil
}

// end kills the page server, and waits for its end.
func (p *process) end() {
	_ = p.Kill()
	<-p.Done()
	p.release()
}

// release lets go of the page server, which runs on.
func (p *process) release() {
	if p.client != nil {
		p.client.Close()
	}
	_ = p.Release()
	if p.cmd != nil {
		_ = p.cmd.Process.Release() // its own pidfd
	}
}

// err says how the process ended, with the end of its log.
func (p *process) err() error { return endedBy(p.cmd, p.log, p.said) }

// endedBy tells how a page server ended. Of one that was adopted, cmd is nil.
func endedBy(cmd *exec.Cmd, log string, said int64) error {
	how := "it ended"
	if cmd != nil && cmd.ProcessState != nil {
		how = cmd.ProcessState.String()
	}
	if tail := complaints(log, said, 3); tail != "" {
		how += ": " + tail
	}
	return fmt.Errorf("page server: %s", how)
}

// complaints returns the last lines of a log, behind from, that tell of something
// wrong, in one.
func complaints(path string, from int64, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 2048
	fi, err := f.Stat()
	if err != nil {
		return ""
	}
	cut := fi.Size()-from > most
	if cut {
		from = fi.Size() - most
	}
	b, err := io.ReadAll(io.NewSectionReader(f, from, most))
	if err != nil {
		return ""
	}
	lines := strings.Split(string(bytes.TrimSpace(b)), "\n")
	if cut {
		lines = lines[1:] // a part of one
	}
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, " level=INFO ") })
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// newTemplate makes the memory that clones share. It cannot change its size:
// nobody gets SIGBUS.
func newTemplate(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("fcvm-template", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	f := os.NewFile(uintptr(fd), "template")
	err = f.Truncate(size)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make template of %d bytes: %w", size, err)
	}
	return f, nil
}
