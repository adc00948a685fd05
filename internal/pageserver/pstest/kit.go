//go:build linux

package pstest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrSkip means that a scenario cannot run here, and why.
var ErrSkip = errors.New("skipped")

// Kit says how page servers are tested.
type Kit struct {
	// Command starts one, see [StartServer].
	Command []string
	// Shape of the VMMs.
	Shape Shape
	// Seed of what is random.
	Seed uint64
	// Patience is how long nothing may happen before it counts as hung; that of
	// [Script] when 0.
	Patience time.Duration
	// Logf prints what was done; nil prints nothing.
	Logf func(format string, args ...any)
}

// Scenario is one situation that a page server has to master. Its name is that of
// a test.
type Scenario struct {
	Name string
	// About says what happens, and what has to come of it.
	About string
	// Only is the shape of memory that it is about; empty means any.
	Only Shape
	run  func(*lab) error
}

// Applies tells whether a scenario is about memory of the kit's shape.
func (k *Kit) Applies(s Scenario) bool { return s.Only == "" || s.Only == k.Shape }

// Run carries out a scenario. The error tells what was wrong, and what the page
// server and the VMMs were doing; it wraps [ErrSkip] when the scenario is none
// for this machine or shape.
func (k *Kit) Run(ctx context.Context, s Scenario) error {
	if !k.Applies(s) {
		return fmt.Errorf("%w: it is about memory of shape %s", ErrSkip, s.Only)
	}
	return k.run(ctx, s.Name, s.run)
}

func (k *Kit) run(ctx context.Context, name string, run func(*lab) error) error {
	l := &lab{Kit: k, ctx: ctx}
	err := run(l)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, ErrSkip) {
		err = fmt.Errorf("%s (%s memory, seed %d): %w%s", name, k.Shape, k.Seed, err, l.describe(err))
	}
	return errors.Join(err, l.close())
}

// lab is where a scenario takes place. What it started, it ends.
type lab struct {
	*Kit
	ctx    context.Context
	server *Server
	vmms   []*VMM
}

// start starts a page server; the one before ends, and its VMMs with it.
func (l *lab) start(pages int) (err error) {
	if err := l.close(); err != nil {
		return err
	}
	l.server, err = StartServer(l.Command, pages)
	return err
}

// close ends everything in order. Without VMMs, a page server has to end when told.
func (l *lab) close() error {
	for _, v := range l.vmms {
		v.Kill()
	}
	l.vmms = nil
	if l.server == nil {
		return nil
	}
	s := l.server
	l.server = nil
	return s.Stop()
}

// vmm starts a VMM that is not connected. Its clone number is how many there were,
// and without regions it has all of the memory file in one.
func (l *lab) vmm(c Config) (*VMM, error) {
	if c.Regions == nil {
		fi, err := os.Stat(l.server.MemFile)
		if err != nil {
			return nil, err
		}
		c.Regions = []Region{{Size: fi.Size()}}
	}
	c.Clone = uint16(len(l.vmms) + 1)
	if c.Shape == "" {
		c.Shape = l.Shape
	}
	v, err := StartVMM(l.ctx, c, l.server.Template)
	if err == nil {
		l.vmms = append(l.vmms, v)
	}
	return v, err
}

// clone starts a VMM and connects it.
func (l *lab) clone(threads int) (*VMM, error) {
	v, err := l.vmm(Config{Threads: threads})
	if err == nil {
		err = v.Connect(Handshake{Socket: l.server.Socket})
	}
	return v, err
}

// clones starts n, alike.
func (l *lab) clones(n, threads int) error {
	for range n {
		if _, err := l.clone(threads); err != nil {
			return err
		}
	}
	return nil
}

// do runs a script, and has anything that is wrong as an error.
func (l *lab) do(v *VMM, threads ...[]Op) error {
	_, err := l.script(v, threads...)
	return err
}

func (l *lab) script(v *VMM, threads ...[]Op) (*Result, error) {
	server, over := l.server, make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-server.Ended():
			v.Kill() // nobody else ends what it waits for
		case <-over:
		}
	}()
	r, err := v.Run(Script{Threads: threads, Patience: l.Patience})
	select {
	case <-server.Ended():
		return nil, fmt.Errorf("the page server ended: %v", server.cmd.ProcessState)
	default:
	}
	if err != nil {
		return nil, fmt.Errorf("clone %d (pid %d): %w", v.config.Clone, v.PID(), err)
	}
	if wrong := r.Wrong(); len(wrong) > 0 {
		return nil, fmt.Errorf("clone %d: %s", v.config.Clone, strings.Join(wrong, "\n  "))
	}
	return r, nil
}

// together runs something for each VMM at the same time.
func together(vmms []*VMM, do func(i int, v *VMM) error) error {
	errs := make(chan error, len(vmms))
	for i, v := range vmms {
		go func() { errs <- do(i, v) }()
	}
	var all []error
	for range vmms {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// served starts a clone that has to see all of its snapshot: the page server is in
// order, whatever came before.
func (l *lab) served() error {
	v, err := l.clone(1)
	if err == nil {
		err = l.do(v, []Op{{Kind: Check, Pages: l.all(), Expect: Expect{Snapshot: true}}})
	}
	if err != nil {
		return fmt.Errorf("a clone that came afterwards: %w", err)
	}
	return nil
}

// all pages of the snapshot.
func (l *lab) all() Pages {
	fi, err := os.Stat(l.server.MemFile)
	if err != nil {
		return Pages{}
	}
	return Range(0, int(fi.Size()/PageSize))
}

// removed is what a page may hold that was given back.
func (l *lab) removed() Expect {
	return Expect{Zero: true, Snapshot: l.Shape == Template}
}

func (l *lab) logf(format string, args ...any) {
	if l.Logf != nil {
		l.Logf(format, args...)
	}
}

// describe tells what the processes were at when err came up. It ends the page server.
func (l *lab) describe(err error) string {
	var s strings.Builder
	for _, v := range l.vmms {
		if how, err := v.Ended(100 * time.Millisecond); err == nil {
			fmt.Fprintf(&s, "\nVMM of clone %d, pid %d: %s", v.config.Clone, v.PID(), how)
		}
	}
	if l.server == nil {
		return s.String()
	}
	signal := unix.SIGTERM
	if errors.Is(err, ErrHung) {
		s.WriteString("\npage server:")
		describeTasks(&s, l.server.PID())
		signal = unix.SIGQUIT // a Go program tells its stacks; any program ends
	}
	fmt.Fprintf(&s, "\npage server's output:\n%s", l.server.end(signal))
	return s.String()
}

// describeTasks tells what the kernel has each thread of a process wait for.
func describeTasks(s *strings.Builder, pid int) {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		fmt.Fprintf(s, " %v", err)
	}
	for _, task := range tasks {
		dir := fmt.Sprintf("/proc/%d/task/%s/", pid, task.Name())
		wchan, _ := os.ReadFile(dir + "wchan")
		stat, _ := os.ReadFile(dir + "stat")
		fmt.Fprintf(s, "\n  thread %s: state %c, wchan %s", task.Name(), stateIn(stat), wchan)
	}
}
