package vmmtest

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
)

// restorePaused starts a clone of s ahead: without ports, and paused.
func (l *lab) restorePaused(t testing.TB, m vmm.Memory, s *snapshot) *started {
	t.Helper()
	p := l.place(t, "ahead")
	c := l.restoreConfig(p, m, s, nil)
	c.Paused = true
	v, err := l.engine.Restore(within(t), c)
	if errors.Is(err, vmm.ErrAttach) {
		nothingLeft(t, p)
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l.owned(t, v, p, l.freePort(t))
}

// A clone that was started ahead has not run, holds next to nothing, and is
// then one like any other.
func (l *lab) testAhead(t *testing.T, b backend) {
	before := digest(t, l.snapshot.mem)
	m := l.memory(t, b, l.snapshot)
	ahead, unused := l.restorePaused(t, m, l.snapshot), l.restorePaused(t, m, l.snapshot)
	// Two clones from the same snapshot, one of them much later.
	other := l.restore(t, m, l.snapshot)
	other.want(t, "write 100", "ok")

	// A guest that runs answers within this time, mostly.
	short, cancel := context.WithTimeout(within(t), 300*time.Millisecond)
	defer cancel()
	if err := ahead.Publish(within(t), published(ahead.port)); err != nil {
		t.Fatal(err)
	}
	if answer, err := ahead.ask(short, "tcp4", "count"); err == nil {
		t.Errorf("a guest that was started ahead runs: it answers %q", answer)
	}
	if err := ahead.Resume(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := ahead.count(t); got < l.snapshot.count+1 || got > l.snapshot.count+2 {
		t.Errorf("it counts %d, want it to go on from %d", got, l.snapshot.count)
	}
	ahead.want(t, "verify", "ok")
	ahead.want(t, "write 100", "ok")
	ahead.want(t, "verify", "ok")
	if got := ahead.info(t).BootID; got != l.snapshot.bootID {
		t.Errorf("it booted as %q, want %q", got, l.snapshot.bootID)
	}
	unused.end(t)
	ahead.want(t, "verify", "ok")
	other.want(t, "verify", "ok")
	if digest(t, l.snapshot.mem) != before {
		t.Error("a clone has changed the snapshot's memory file")
	}
}

// Ports are published later, too: all of a request or none.
func (l *lab) testPublish(t *testing.T) {
	if l.noNetwork {
		t.Skip("this engine has no network")
	}
	c := l.clone(t)
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	more := l.freePort(t)
	ports := append(published(more), vmm.Port{HostIP: "127.0.0.1", HostPort: port, GuestPort: 80, Proto: "tcp"})
	err = c.Publish(within(t), ports)
	if err == nil || !strings.Contains(err.Error(), strconv.Itoa(port)) || !strings.Contains(err.Error(), "in use") && !errors.Is(err, network.ErrTaken) {
		t.Errorf("the error does not tell which port is in use: %v", err)
	}
	for what, spoil := range map[string]func(p *vmm.Port){
		"odd protocol":   func(p *vmm.Port) { p.Proto = "sctp" },
		"odd address":    func(p *vmm.Port) { p.HostIP = "127.0.0.1:1-:1 " },
		"port 0":         func(p *vmm.Port) { p.HostPort = 0 },
		"guest port 7e4": func(p *vmm.Port) { p.GuestPort = 70000 },
	} {
		bad := published(more)
		spoil(&bad[1])
		if err := c.Publish(within(t), bad); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	// None of the failures has left a port behind.
	if err := c.Publish(within(t), published(more)); err != nil {
		t.Fatal(err)
	}
	c.want(t, "verify", "ok") // the first one's port
	c.port = more
	c.want(t, "verify", "ok")
	if err := errors.Join(c.Pause(within(t)), c.Publish(within(t), published(l.freePort(t)))); err != nil {
		t.Errorf("publish while paused: %v", err)
	}
	if err := c.Publish(within(t), nil); err != nil {
		t.Errorf("publish nothing: %v", err)
	}
}
