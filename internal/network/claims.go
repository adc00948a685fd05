package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"

	"fcvm/internal/vmm"
)

// ErrTaken is wrapped by the errors of [Claims.Claim] that are about a port that
// somebody holds.
var ErrTaken = errors.New("port is taken")

// Claims remembers which VM holds which host ports. The zero value is ready to
// use; its methods may be called concurrently.
//
// A port that was found free is free for this supervisor's VMs only by being
// claimed: the VMM listens some milliseconds later.
type Claims struct {
	mu   sync.Mutex
	held map[string][]vmm.Port // by owner; guarded by mu
}

// Claim checks that the ports are free, chooses one for each HostPort 0, and
// holds them all for owner, or none. Further calls for one owner add to what it
// holds.
func (c *Claims) Claim(ctx context.Context, owner string, ports []vmm.Port) ([]vmm.Port, error) {
	if err := Check(ports); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	got := make([]vmm.Port, 0, len(ports))
	for _, p := range ports {
		p, err := c.find(ctx, p, got)
		if err != nil {
			return nil, err
		}
		got = append(got, p)
	}
	c.hold(owner, got)
	return got, nil
}

// Hold records what a VM that already listens holds.
func (c *Claims) Hold(owner string, ports []vmm.Port) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold(owner, ports)
}

// Release gives up all ports of an owner. It is idempotent.
func (c *Claims) Release(owner string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.held, owner)
}

func (c *Claims) hold(owner string, ports []vmm.Port) {
	if len(ports) == 0 {
		return
	}
	if c.held == nil {
		c.held = make(map[string][]vmm.Port)
	}
	c.held[owner] = append(c.held[owner], ports...)
}

func (c *Claims) find(ctx context.Context, p vmm.Port, also []vmm.Port) (vmm.Port, error) {
	if p.HostPort != 0 {
		if owner := c.owner(p, also); owner != "" {
			return p, fmt.Errorf("publish port %s: VM %s has it: %w", HostAddr(p), owner, ErrTaken)
		}
		_, err := listen(ctx, p)
		return p, err
	}
	// The kernel may offer one that a VM is about to listen on.
	for range 100 {
		q := p
		n, err := listen(ctx, p)
		if err != nil {
			return p, err
		}
		if q.HostPort = n; c.owner(q, also) == "" {
			return q, nil
		}
	}
	return p, fmt.Errorf("publish port for guest port %d: no free port found: %w", p.GuestPort, ErrTaken)
}

// owner returns who holds a port that p would collide with, or "".
func (c *Claims) owner(p vmm.Port, also []vmm.Port) string {
	for owner, ports := range c.held {
		for _, q := range ports {
			if overlap(p, q) {
				return owner
			}
		}
	}
	for _, q := range also {
		if overlap(p, q) {
			return "itself"
		}
	}
	return ""
}

// listen listens on p for a moment, and returns the port.
func listen(ctx context.Context, p vmm.Port) (int, error) {
	// The engines' user-mode network listens on IPv4 unless told otherwise.
	network, ip := p.Proto+"4", p.HostIP
	if a := net.ParseIP(ip); a != nil && a.To4() == nil {
		network = p.Proto + "6"
	}
	if ip == "" {
		ip = "0.0.0.0"
	}
	addr := net.JoinHostPort(ip, strconv.Itoa(p.HostPort))
	var lc net.ListenConfig
	var port int
	var err error
	if p.Proto == "udp" {
		var l net.PacketConn
		if l, err = lc.ListenPacket(ctx, network, addr); err == nil {
			if a, ok := l.LocalAddr().(*net.UDPAddr); ok {
				port = a.Port
			}
			err = l.Close()
		}
	} else {
		var l net.Listener
		if l, err = lc.Listen(ctx, network, addr); err == nil {
			if a, ok := l.Addr().(*net.TCPAddr); ok {
				port = a.Port
			}
			err = l.Close()
		}
	}
	if err != nil {
		return 0, ListenError(p, err)
	}
	return port, nil
}

// ListenError says for a person why a port cannot be listened on. It wraps
// [ErrTaken] where somebody else does.
func ListenError(p vmm.Port, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("publish port %s: another program listens there: %w", HostAddr(p), ErrTaken)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("publish port %s: ports below 1024 need root: %w", HostAddr(p), err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("publish port %s: this host has no such address: %w", HostAddr(p), err)
	}
	return fmt.Errorf("publish port %s: %w", HostAddr(p), err)
}
