//go:build linux

package pageserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm"
	vmmprocess "fcvm/internal/vmm/process"
)

const (
	// LogName is the log of a page server, in LaunchConfig.Dir.
	LogName = "uffd_handler.log"
	// Descriptors of a launched page server.
	templateFD = 3
	readyFD    = 4
	// ReadyLine is what uffd_handler writes to --ready-fd once it listens.
	ReadyLine = "ready\n"
)

// LaunchConfig says how to start a page server.
type LaunchConfig struct {
	// Binary is the path of uffd_handler.
	Binary string
	// Dir is where its log goes, Runtime where its sockets. Both exist, and
	// Runtime is short.
	Dir, Runtime string
	// MemFile is the snapshot's memory file, Size its size in bytes.
	MemFile string
	Size    int64
	Policy  Policy
	// IdleTimeout ends it on its own when for so long neither a clone nor a
	// supervisor was connected, such as "30s"; empty means never.
	IdleTimeout string
	// Inherit are files that it keeps open for its life, such as leases. The
	// caller closes its own copies.
	Inherit []*os.File
}

// Handle is what a restarted supervisor needs to adopt a page server.
type Handle struct {
	PID int `json:"pid"`
	// StartTime in clock ticks since boot, which tells a recycled pid.
	StartTime uint64 `json:"start_time"`
	Socket    string `json:"socket"`
	Control   string `json:"control"`
	// TemplateFD is the template's number in the page server.
	TemplateFD int `json:"template_fd"`
	// Log is the path of its log.
	Log string `json:"log"`
}

// Process is a page server that runs, in a session of its own: it outlives the
// process that started it. As long as it is held on to, it is not idle. Its
// methods may be called concurrently.
type Process struct {
	handle Handle
	proc   *vmmprocess.Process
	cmd    *exec.Cmd // nil when adopted

	// mu guards client, which is replaced when an exchange failed.
	mu     sync.Mutex
	client *controlClient
}

// Launch starts a page server, and returns when it listens. When it fails, or ctx
// ends first, nothing is left behind but the log.
func Launch(ctx context.Context, c LaunchConfig) (_ *Process, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	template, err := newTemplateFile(c.Size)
	if err != nil {
		return nil, err
	}
	defer template.Close()
	h := Handle{
		Socket:     filepath.Join(c.Runtime, "uffd.sock"),
		Control:    filepath.Join(c.Runtime, "control.sock"),
		TemplateFD: templateFD,
		Log:        filepath.Join(c.Dir, LogName),
	}
	log, err := os.OpenFile(h.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("launch page server: %w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("launch page server: %w", err)
	}
	defer r.Close()
	defer w.Close()

	cmd := exec.Command(c.Binary, h.Socket, c.MemFile, "--policy", string(c.Policy),
		"--template", "/proc/self/fd/"+strconv.Itoa(templateFD), "--control", h.Control, "--ready-fd", strconv.Itoa(readyFD))
	if c.IdleTimeout != "" {
		cmd.Args = append(cmd.Args, "--idle-timeout", c.IdleTimeout)
	}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = append([]*os.File{template, w}, c.Inherit...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("launch page server: %w", err)
	}
	w.Close()
	proc, err := vmmprocess.Started(cmd)
	if errors.Is(err, vmmprocess.ErrGone) { // it has ended already, and says why
		return nil, fmt.Errorf("launch page server: %w", endedBy(cmd, h.Log))
	}
	if err != nil {
		return nil, fmt.Errorf("launch page server: %w", err)
	}
	p := &Process{handle: h, proc: proc, cmd: cmd}
	p.handle.PID, p.handle.StartTime = proc.PID(), proc.StartTime()
	if err = p.awaitReady(ctx, r); err == nil {
		_, err = p.connect(ctx)
	}
	if err != nil {
		_ = proc.Kill()
		<-proc.Done()
		p.Release()
		p.removeSockets()
		return nil, fmt.Errorf("launch page server: %w", err)
	}
	return p, nil
}

// newTemplateFile makes the memory that clones share. It cannot change its size:
// nobody gets SIGBUS.
func newTemplateFile(size int64) (*os.File, error) {
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

// awaitReady reads the line that says so. The pipe ends when the process does.
func (p *Process) awaitReady(ctx context.Context, r *os.File) error {
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	line, err := io.ReadAll(io.LimitReader(r, int64(len(ReadyLine))))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case string(line) != ReadyLine:
		<-p.proc.Done()
		return p.Err()
	}
	return nil
}

// Adopt takes over a page server that another process launched. The error wraps
// [vmm.ErrGone] when it has ended.
func Adopt(ctx context.Context, h Handle) (*Process, error) {
	proc, err := vmmprocess.Adopt(h.PID, h.StartTime)
	if errors.Is(err, vmmprocess.ErrGone) {
		return nil, fmt.Errorf("adopt page server: %w: %w", vmm.ErrGone, err)
	}
	if err != nil {
		return nil, fmt.Errorf("adopt page server: %w", err)
	}
	p := &Process{handle: h, proc: proc}
	if _, err := p.connect(ctx); err != nil {
		p.Release()
		return nil, fmt.Errorf("adopt page server: %w", err)
	}
	return p, nil
}

// Handle is what [Adopt] needs.
func (p *Process) Handle() Handle { return p.handle }

// PID of the page server.
func (p *Process) PID() int { return p.handle.PID }

// Socket is where VMMs shake hands.
func (p *Process) Socket() string { return p.handle.Socket }

// Done is closed when the process has ended; not after Release.
func (p *Process) Done() <-chan struct{} { return p.proc.Done() }

// Err says how the process ended, with the end of its log; nil before Done.
func (p *Process) Err() error {
	select {
	case <-p.proc.Done():
	default:
		return nil
	}
	return endedBy(p.cmd, p.handle.Log)
}

// endedBy tells how a page server ended. Of one that was adopted, cmd is nil.
func endedBy(cmd *exec.Cmd, log string) error {
	how := "it ended"
	if cmd != nil && cmd.ProcessState != nil {
		how = cmd.ProcessState.String()
	}
	if tail := complaints(log, 3); tail != "" {
		how += ": " + tail
	}
	return fmt.Errorf("page server: %s", how)
}

// Template opens the template for reading. The caller closes it. It is for VMMs,
// with a userfaultfd on the mapping: a read through any other mapping makes the
// kernel fill a hole with zeros, for all clones. read(2) does not.
func (p *Process) Template() (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", p.handle.PID, p.handle.TemplateFD))
	if err != nil {
		return nil, fmt.Errorf("open template: %w", err)
	}
	return f, nil
}

// Stats asks the page server.
func (p *Process) Stats(ctx context.Context) (Stats, error) {
	r, err := p.ask(ctx, controlRequest{Op: "stats"})
	if err != nil {
		return Stats{}, err
	}
	if r.Stats == nil {
		return Stats{}, errors.New("ask page server for stats: it sent none")
	}
	return *r.Stats, nil
}

// Stop ends the page server and waits for that. Clones that still run stop at
// their next fault. When ctx ends, or the page server does not answer, it is killed.
func (p *Process) Stop(ctx context.Context) error {
	_, err := p.ask(ctx, controlRequest{Op: "shutdown", Force: true})
	if err == nil {
		err = p.proc.Wait(ctx)
	}
	if err != nil {
		if err := p.proc.Kill(); err != nil {
			return fmt.Errorf("stop page server: %w", err)
		}
		<-p.proc.Done()
	}
	p.Release()
	p.removeSockets()
	return nil
}

// Release lets go of the page server, which runs on. Other methods fail then. It
// is idempotent.
func (p *Process) Release() {
	p.mu.Lock()
	if p.client != nil {
		p.client.close()
	}
	p.mu.Unlock()
	_ = p.proc.Release()
}

func (p *Process) removeSockets() {
	_ = os.Remove(p.handle.Socket)
	_ = os.Remove(p.handle.Control)
}

// connect makes a connection to the control socket where there is none.
func (p *Process) connect(ctx context.Context) (*controlClient, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client != nil {
		return p.client, nil
	}
	c, err := dialControl(ctx, p.handle.Control)
	p.client = c
	return c, err
}

func (p *Process) ask(ctx context.Context, q controlRequest) (controlResponse, error) {
	c, err := p.connect(ctx)
	if err != nil {
		return controlResponse{}, err
	}
	r, err := c.ask(ctx, q)
	if err != nil && !errors.Is(err, errAnswered) {
		p.mu.Lock()
		if p.client == c {
			p.client = nil
		}
		p.mu.Unlock()
	}
	return r, err
}

// complaints returns the last lines of a log that tell of something wrong, in one.
func complaints(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 2048
	if fi, err := f.Stat(); err == nil && fi.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd)
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return ""
	}
	lines := strings.Split(string(bytes.TrimSpace(b)), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, " level=INFO ") })
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}
