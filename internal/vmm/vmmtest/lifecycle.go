package vmmtest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
)

// clone starts one in the way that needs least.
func (l *lab) clone(t *testing.T) *started {
	t.Helper()
	return l.restore(t, l.memory(t, backends[0], l.snapshot), l.snapshot)
}

// A VM outlives the process that started it, and all of it works for the next.
func (l *lab) testAdopt(t *testing.T) {
	p, port := l.place(t, "adopt"), l.freePort(t)
	h := l.bootElsewhere(t, l.bootConfig(p, published(port)))
	if h.Dir != p.Dir || h.Runtime != p.Runtime || h.PID == 0 || h.StartTime == 0 {
		t.Errorf("handle %+v of place %+v", h, p)
	}
	v, err := l.engine.Adopt(within(t), h)
	if err != nil {
		t.Fatal(err)
	}
	s := l.owned(t, v, p, port)
	s.startProbe(t)
	s.want(t, "verify", "ok")
	ctx := within(t)
	if err := s.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveState(ctx, filepath.Join(t.TempDir(), "state")); err != nil {
		t.Fatal(err)
	}
	if err := s.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	s.want(t, "verify", "ok")

	recycled := h
	recycled.StartTime++
	if _, err := l.engine.Adopt(ctx, recycled); !notRunning(err) {
		t.Errorf("adopt a recycled pid: %v, want ErrGone", err)
	}
	s.end(t)
	if _, err := l.engine.Adopt(ctx, h); !notRunning(err) {
		t.Errorf("adopt what has ended: %v, want ErrGone", err)
	}
}

// A VM that is released can be adopted in the same process, again and again.
func (l *lab) testAdoptAgain(t *testing.T) {
	c := l.clone(t)
	v := c.VM
	for range 3 {
		for range 2 {
			if err := v.Release(); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Pause(within(t)); err == nil {
			t.Error("a released VM takes commands")
		}
		next, err := l.engine.Adopt(within(t), c.Handle())
		if err != nil {
			t.Fatal(err)
		}
		v = next
		if err := errors.Join(v.Pause(within(t)), v.Resume(within(t))); err != nil {
			t.Fatal(err)
		}
	}
	c.VM = v // for the end
	c.want(t, "verify", "ok")
}

// A lease that the VMM inherits lasts exactly as long as the VMM.
func (l *lab) testInherit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	lease, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lease.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	p := l.place(t, "inherit")
	p.Inherit = []*os.File{lease}
	v, err := l.engine.Restore(within(t), l.restoreConfig(p, l.memory(t, backends[0], l.snapshot), l.snapshot, nil))
	if err != nil {
		t.Fatal(err)
	}
	s := l.owned(t, v, p, 0)
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("lock the lease while the VM runs: %v, want EWOULDBLOCK", err)
	}
	s.end(t)
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("lock the lease after the end: %v", err)
	}
}

func (l *lab) testKill(t *testing.T) {
	c := l.clone(t)
	for range 2 {
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	<-c.Done()
	if err := c.Kill(); err != nil {
		t.Errorf("kill what has ended: %v", err)
	}
	l.refusesAll(t, c)
}

// refusesAll checks what a VM that has ended says.
func (l *lab) refusesAll(t *testing.T, c *started) {
	t.Helper()
	ctx := within(t)
	_, dialErr := c.DialAgent(ctx)
	for what, err := range map[string]error{
		"pause":   c.Pause(ctx),
		"resume":  c.Resume(ctx),
		"save":    c.SaveState(ctx, filepath.Join(t.TempDir(), "state")),
		"balloon": c.Balloon(ctx, memoryBytes),
		"publish": c.Publish(ctx, published(l.freePort(t))),
		"dial":    dialErr,
	} {
		if !notRunning(err) {
			t.Errorf("%s: %v, want ErrGone", what, err)
		}
	}
}

// A VMM that dies by itself is noticed.
func (l *lab) testDead(t *testing.T) {
	c := l.clone(t)
	select {
	case <-c.Done():
		t.Fatalf("ended too early: %s", c.Tail())
	default:
	}
	if err := unix.Kill(c.Handle().PID, unix.SIGSEGV); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-within(t).Done():
		t.Fatal("its death was not noticed")
	}
	l.refusesAll(t, c)
}

// A VMM that hangs costs a command its time, and can be killed.
func (l *lab) testHung(t *testing.T) {
	c := l.clone(t)
	if err := unix.Kill(c.Handle().PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) || notRunning(err) {
		t.Errorf("pause: %v, want a timeout", err)
	}
	if err := unix.Kill(c.Handle().PID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// The late answer confuses nobody, and the pause was carried out.
	if err := c.Resume(within(t)); err != nil {
		t.Fatal(err)
	}
	c.want(t, "verify", "ok")
	if err := unix.Kill(c.Handle().PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-within(t).Done():
		t.Fatal("a VMM that hangs can't be killed")
	}
}

func (l *lab) testPortTaken(t *testing.T) {
	if l.noNetwork {
		t.Skip("this engine has no network")
	}
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	m := l.memory(t, backends[0], l.snapshot)
	ports := []vmm.Port{{HostIP: "127.0.0.1", HostPort: port, GuestPort: 80, Proto: "tcp"}}
	for what, start := range map[string]func(vmm.Place) (vmm.VM, error){
		"boot": func(p vmm.Place) (vmm.VM, error) { return l.engine.Boot(within(t), l.bootConfig(p, ports)) },
		"restore": func(p vmm.Place) (vmm.VM, error) {
			return l.engine.Restore(within(t), l.restoreConfig(p, m, l.snapshot, ports))
		},
	} {
		p := l.place(t, "taken")
		v, err := start(p)
		if err == nil {
			l.owned(t, v, p, port)
			t.Errorf("%s: no error", what)
			continue
		}
		if !strings.Contains(err.Error(), strconv.Itoa(port)) || !strings.Contains(err.Error(), "in use") && !errors.Is(err, network.ErrTaken) {
			t.Errorf("%s: the error does not tell which port is in use: %v", what, err)
		}
		nothingLeft(t, p)
	}
}
