//go:build linux

package pstest

import (
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm"
)

// Shape is how a VMM maps its memory.
type Shape string

// The shapes.
const (
	// Anonymous memory, as Firecracker's mem backend "Uffd" maps it.
	Anonymous Shape = "anonymous"
	// Template is memory that maps the page server's template privately, as that of a
	// VMM that was attached to.
	Template Shape = "template"
	// Plain is memory that maps the template privately and has no userfaultfd: the
	// kernel alone answers its faults, which is what others are measured against.
	Plain Shape = "plain"
)

// Config of a VMM.
type Config struct {
	Shape Shape
	// Regions of its memory, in the order of the handshake.
	Regions []Region
	// PageSize is [PageSize] when 0, or [HugePageSize] for anonymous memory of
	// reserved huge pages.
	PageSize int
	// Threads is how many a script may have at most; 1 when 0.
	Threads int
	// Clone is the number that its writes are marked with, from 1 to 4095; 1 when 0.
	Clone uint16
}

// Region is a part of the memory file that a VMM maps in one piece.
type Region struct {
	// Offset in the memory file and Size, in bytes, whole pages.
	Offset, Size int64
	// Slot orders regions by address; among equal ones the first is lowest.
	Slot int
}

// Outcomes on which the caller decides.
var (
	// ErrHung means that threads of a VMM wait and nobody answers.
	ErrHung = errors.New("VMM hangs")
	// ErrEnded means that the VMM ended in the middle of what it was to do.
	ErrEnded = errors.New("VMM has ended")
)

// VMM is a process with memory that a page server fills. Its methods may be called
// concurrently: scripts that run at the same time share the VMM's threads.
type VMM struct {
	cmd    *exec.Cmd
	config Config
	in     *os.File
	wait   func() error
	// mappings are what it has mapped, as a handshake tells it, and uffd the number
	// of its userfaultfd.
	mappings []mapping
	uffd     int

	// mu guards what follows.
	mu     sync.Mutex
	enc    *gob.Encoder
	number uint64
	asked  map[uint64]chan answer
	ended  bool
	// heard is closed when nothing more will be answered.
	heard chan struct{}
}

// Main makes this process a VMM if [StartVMM] started it so, and then does not
// return.
func Main() {
	if os.Getenv(envVMM) != "" {
		os.Exit(serveParent())
	}
}

// StartVMM starts a VMM and returns when its memory is mapped, and its userfaultfd
// made, which nobody serves before [VMM.Connect]. The template, open for reading, is
// needed for that shape, and stays the caller's. When ctx ends, the VMM is killed. The caller ends it by
// Stop or Kill, after which nothing of it is left.
func StartVMM(ctx context.Context, c Config, template *os.File) (_ *VMM, err error) {
	if c.PageSize == 0 {
		c.PageSize = PageSize
	}
	c.Threads, c.Clone = max(c.Threads, 1), max(c.Clone, 1)
	if c.Shape != Anonymous && template == nil {
		return nil, errors.New("start VMM: there is no template")
	}
	stdin, in, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start VMM: %w", err)
	}
	defer stdin.Close()
	out, stdout, err := os.Pipe()
	if err != nil {
		in.Close()
		return nil, fmt.Errorf("start VMM: %w", err)
	}
	defer stdout.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), envVMM+"=1",
		// Each thread that waits for a page keeps a P, and the rest has to go on.
		"GOMAXPROCS="+strconv.Itoa(c.Threads+4),
		// A thread that waits cannot be stopped for the collector. Signals to preempt it
		// would end its wait, and make it fault again, as often as they come.
		"GOGC=off", "GODEBUG=asyncpreemptoff=1",
		// The race detector sleeps for a second when a process ends, unless told.
		"GORACE=atexit_sleep_ms=0")
	cmd.Stdin, cmd.Stderr = stdin, os.Stderr
	cmd.ExtraFiles = []*os.File{stdout}
	if template != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, template)
	}
	if err := cmd.Start(); err != nil {
		in.Close()
		out.Close()
		return nil, fmt.Errorf("start VMM: %w", err)
	}
	stdout.Close()
	v := &VMM{cmd: cmd, config: c, in: in, enc: gob.NewEncoder(in), asked: make(map[uint64]chan answer), heard: make(chan struct{})}
	v.wait = sync.OnceValue(cmd.Wait)
	go v.hear(out)
	a, err := v.ask(request{Start: &c})
	if err != nil {
		v.Kill()
		return nil, fmt.Errorf("start VMM: %w", err)
	}
	v.mappings, v.uffd = a.Mappings, a.UFFD
	return v, nil
}

// Mapped is where the regions are in the VMM's address space.
func (v *VMM) Mapped() []vmm.Region {
	at := make([]vmm.Region, len(v.mappings))
	for i, m := range v.mappings {
		at[i] = vmm.Region{Addr: m.Addr, Size: int64(m.Size), Offset: int64(m.Offset)}
	}
	return at
}

// UFFD duplicates the VMM's userfaultfd, as who attached to it would have it, and who
// shakes hands on its behalf. The caller closes it. It needs the permission to trace the VMM.
func (v *VMM) UFFD() (*os.File, error) {
	pidfd, err := unix.PidfdOpen(v.PID(), 0)
	if err != nil {
		return nil, fmt.Errorf("fetch userfaultfd: %w", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, v.uffd, 0)
	if err != nil {
		return nil, fmt.Errorf("fetch userfaultfd: %w", err)
	}
	return os.NewFile(uintptr(fd), "userfaultfd"), nil
}

// PID of the VMM.
func (v *VMM) PID() int { return v.cmd.Process.Pid }

// Connect shakes hands with a page server. What that thinks of it shows later, also
// when it kills the VMM for it.
func (v *VMM) Connect(h Handshake) error {
	if _, err := v.ask(request{Handshake: &h}); err != nil && !errors.Is(err, ErrEnded) {
		return fmt.Errorf("shake hands: %w", err)
	}
	return nil
}

// AwaitClose returns when the page server has ended the connection of the last
// handshake. A VMM that was killed is [ErrEnded].
func (v *VMM) AwaitClose() error {
	_, err := v.ask(request{AwaitClose: true})
	return err
}

// Disconnect ends the connection of the last handshake, which the VMM keeps
// otherwise.
func (v *VMM) Disconnect() error {
	_, err := v.ask(request{Disconnect: true})
	return err
}

// handshake is the JSON that [VMM.Connect] sends.
func (v *VMM) handshake() ([]byte, error) { return json.Marshal(v.mappings) }

// Run carries out a script, and returns when all threads are done. The error
// wraps [ErrHung] when they no longer do anything, or [ErrEnded] when the VMM ended, as
// by [Exit] or because the page server killed it. What checks found wrong is
// in the result, and no error.
func (v *VMM) Run(s Script) (*Result, error) {
	if len(s.Threads) > v.config.Threads {
		return nil, fmt.Errorf("run script: %d threads, but the VMM was started for %d", len(s.Threads), v.config.Threads)
	}
	a, err := v.ask(request{Script: &s})
	if err != nil {
		return nil, fmt.Errorf("run script: %w", err)
	}
	return a.Result, nil
}

func (v *VMM) ask(r request) (answer, error) {
	answered, err := v.send(r)
	if err != nil {
		return answer{}, err
	}
	a, ok := <-answered
	switch {
	case !ok:
		return a, ErrEnded
	case len(a.Hung) > 0:
		return a, fmt.Errorf("%w:\n  %s", ErrHung, strings.Join(a.Hung, "\n  "))
	case a.Err != "":
		return a, errors.New(a.Err)
	}
	return a, nil
}

func (v *VMM) send(r request) (<-chan answer, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return nil, ErrEnded
	}
	v.number++
	r.Number = v.number
	if err := v.enc.Encode(r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEnded, err)
	}
	answered := make(chan answer, 1)
	v.asked[r.Number] = answered
	return answered, nil
}

// hear hands out answers until the VMM has ended.
func (v *VMM) hear(out *os.File) {
	defer close(v.heard)
	defer out.Close()
	for dec := gob.NewDecoder(out); ; {
		var a answer
		err := dec.Decode(&a)
		v.mu.Lock()
		if err != nil {
			v.ended = true
			for _, answered := range v.asked {
				close(answered)
			}
			clear(v.asked)
			v.mu.Unlock()
			return
		}
		answered := v.asked[a.Number]
		delete(v.asked, a.Number)
		v.mu.Unlock()
		answered <- a
	}
}

// Stop ends the VMM in order, and returns how it ended.
func (v *VMM) Stop() error {
	v.in.Close()
	err := v.wait()
	<-v.heard
	if err != nil {
		return fmt.Errorf("stop VMM: %w", err)
	}
	return nil
}

// Kill ends the VMM at once. One that has ended is no error.
func (v *VMM) Kill() {
	_ = v.cmd.Process.Kill()
	_ = v.Stop()
}

// Ended waits until the VMM has ended, for at most so long, and tells how it did,
// such as "signal: killed".
func (v *VMM) Ended(within time.Duration) (string, error) {
	done := make(chan struct{})
	go func() { defer close(done); _ = v.wait() }()
	select {
	case <-done:
		return v.cmd.ProcessState.String(), nil
	case <-time.After(within):
		return "", fmt.Errorf("VMM runs, and was to end within %v", within)
	}
}
