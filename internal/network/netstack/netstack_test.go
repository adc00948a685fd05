//go:build linux

package netstack_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"fcvm/internal/network"
	"fcvm/internal/network/netstack"
	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
)

// machine stands for a VM: the kernel's own TCP/IP in a namespace, with eth0 as the
// guest has it, behind a stack under test. The other end of the veth is the TAP.
type machine struct {
	*namespace
	stack *netstack.Stack
}

var veths int

func newMachine(t *testing.T, c netstack.Config) *machine {
	t.Helper()
	m := &machine{namespace: newNamespace(t)}
	veths++
	name := fmt.Sprintf("tap%d", veths)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: netstack.MTU}, PeerName: "eth0", PeerNamespace: netlink.NsFd(m.fd)}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal("add veth:", err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(veth) })
	// Before the socket is bound, which otherwise begins with an error.
	if err := netlink.LinkSetUp(veth); err != nil {
		t.Fatal(err)
	}
	packets, err := tapnet.Packets(name)
	if err != nil {
		t.Fatal(err)
	}
	m.do(func() { err = configureGuest() })
	if err != nil {
		t.Fatal("configure guest:", err)
	}
	if m.stack, err = netstack.New(packets, c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.stack.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func configureGuest() error {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(netip.PrefixFrom(netstack.Guest, netstack.Subnet.Bits()).String())
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetUp(eth0), netlink.AddrAdd(eth0, addr)); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: netstack.Gateway.AsSlice()})
}

// dial connects from the guest.
func (m *machine) dial(t *testing.T, proto, to string) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	var err error
	m.do(func() { c, err = net.DialTimeout(proto, to, 20*time.Second) })
	if err == nil {
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c, err
}

// serve runs an echo server: of whole streams for TCP, of datagrams for UDP.
func serve(t *testing.T, proto, addr string) netip.AddrPort {
	t.Helper()
	if proto == "udp" {
		c, err := net.ListenPacket("udp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		go func() {
			b := make([]byte, 65536)
			for {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = c.WriteTo(b[:n], from)
			}
		}()
		return c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	l, err := net.Listen("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection, whose other end the test closes
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// echo sends data, ends the stream, and wants all of it back, and its end.
func echo(t *testing.T, c net.Conn, size int) {
	t.Helper()
	data := make([]byte, size)
	_, _ = rand.Read(data)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal("echo:", err)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("%d bytes came back otherwise than the %d that were sent", len(got), len(data))
	}
}

func echoDatagram(t *testing.T, c net.Conn, size int) {
	t.Helper()
	data := make([]byte, size)
	_, _ = rand.Read(data)
	got := make([]byte, 65536)
	// UDP may lose what is sent while addresses are still being resolved.
	for range 10 {
		if _, err := c.Write(data); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, err := c.Read(got)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			t.Fatal("echo:", err)
		}
		if !bytes.Equal(got[:n], data) {
			t.Fatalf("%d bytes came back otherwise than the %d that were sent", n, size)
		}
		return
	}
	t.Fatal("no datagram came back")
}

func TestOutgoing(t *testing.T) {
	m := newMachine(t, netstack.Config{})
	tcp := serve(t, "tcp", hostAddr+":0")
	udp := serve(t, "udp", hostAddr+":0")
	// 8 MiB do not fit any window, and are cut and summed up by whoever does that.
	for _, size := range []int{1, 100_000, 8 << 20} {
		c, err := m.dial(t, "tcp4", tcp.String())
		if err != nil {
			t.Fatal(err)
		}
		echo(t, c, size)
	}
	// 9,000 are fragments.
	for _, size := range []int{0, 1, 1400, 9000} {
		c, err := m.dial(t, "udp4", udp.String())
		if err != nil {
			t.Fatal(err)
		}
		echoDatagram(t, c, size)
	}
}

func TestPublished(t *testing.T) {
	m := newMachine(t, netstack.Config{})
	m.do(func() {
		serve(t, "tcp", "0.0.0.0:80")
		serve(t, "udp", "0.0.0.0:53")
	})
	var claims network.Claims
	ports, err := claims.Claim(t.Context(), "m", []vmm.Port{
		{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"},
		{HostIP: "127.0.0.1", GuestPort: 53, Proto: "udp"},
		{GuestPort: 81, Proto: "tcp"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.stack.Publish(t.Context(), ports); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 8 << 20} {
		c, err := net.Dial("tcp4", network.HostAddr(ports[0]))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		echo(t, c, size)
	}
	for range 3 { // senders of their own
		c, err := net.Dial("udp4", strings.TrimSuffix(network.HostAddr(ports[1]), "/udp"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		echoDatagram(t, c, 1)
		echoDatagram(t, c, 9000)
	}
	// Nobody listens in the guest: the connection ends, and does not hang.
	c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", ports[2].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read from a port that nobody in the guest listens on: %v", err)
	}
}

// A guest that says nothing for some seconds, as one that is paused, is reached when it goes on.
func TestPublishedPaused(t *testing.T) {
	m := newMachine(t, netstack.Config{})
	var claims network.Claims
	ports, err := claims.Claim(t.Context(), "m", []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.stack.Publish(t.Context(), ports); err != nil {
		t.Fatal(err)
	}
	silent := func(on bool) {
		m.do(func() {
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			set := netlink.LinkSetARPOn
			if on {
				set = netlink.LinkSetARPOff
			}
			if err := set(eth0); err != nil {
				t.Fatal(err)
			}
		})
	}
	m.do(func() { serve(t, "tcp", "0.0.0.0:80") })
	silent(true)
	c, err := net.Dial("tcp4", network.HostAddr(ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(4500 * time.Millisecond) // more than three tries
	silent(false)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("the connection that was made while the guest stood still: %v", err)
	}
}

func TestPublishAllOrNothing(t *testing.T) {
	m := newMachine(t, netstack.Config{})
	taken := serve(t, "tcp", "127.0.0.1:0")
	var claims network.Claims
	free, err := claims.Claim(t.Context(), "m", []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}})
	if err != nil {
		t.Fatal(err)
	}
	err = m.stack.Publish(t.Context(), append(free, vmm.Port{HostIP: "127.0.0.1", HostPort: int(taken.Port()), GuestPort: 80, Proto: "tcp"}))
	if !errors.Is(err, network.ErrTaken) {
		t.Errorf("publish a port that is taken: %v", err)
	}
	if err := m.stack.Publish(t.Context(), free); err != nil {
		t.Errorf("publish what was free, after a failure: %v", err)
	}
	if err := m.stack.Close(); err != nil {
		t.Error(err)
	}
	l, err := net.Listen("tcp4", network.HostAddr(free[0]))
	if err != nil {
		t.Fatalf("the port is not free after Close: %v", err)
	}
	l.Close()
}

func TestRefused(t *testing.T) {
	a, b := newMachine(t, netstack.Config{}), newMachine(t, netstack.Config{})
	loopback := serve(t, "tcp", "127.0.0.1:0")
	datagrams := serve(t, "udp", "127.0.0.1:0")
	b.do(func() { serve(t, "tcp", "0.0.0.0:80") })
	for what, to := range map[string]string{
		"the host's loopback by the router":  netip.AddrPortFrom(netstack.Gateway, loopback.Port()).String(),
		"the host's loopback by name server": netip.AddrPortFrom(netstack.Nameserver, loopback.Port()).String(),
		"a neighbour":                        "10.0.2.77:80",
		"the cloud's metadata":               "169.254.169.254:80",
	} {
		c, err := a.dial(t, "tcp4", to)
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("dial %s: %v, %v", what, c, err)
		}
	}
	c, err := a.dial(t, "udp4", netip.AddrPortFrom(netstack.Gateway, datagrams.Port()).String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a datagram to the host's loopback: %v", err)
	}
	// The kernel does not let a guest's programs send to 127.0.0.1 or 0.0.0.0 by eth0.
	// A guest that wants to can.
	for _, to := range []string{"127.0.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "10.0.2.15"} {
		if addr := netip.MustParseAddr(to); a.stack.Allowed(netip.AddrPortFrom(addr, loopback.Port())) {
			t.Errorf("guests may send to %s", to)
		}
	}
}

func TestHostLoopback(t *testing.T) {
	m := newMachine(t, netstack.Config{HostLoopback: true})
	server := serve(t, "tcp", "127.0.0.1:0")
	c, err := m.dial(t, "tcp4", netip.AddrPortFrom(netstack.Gateway, server.Port()).String())
	if err != nil {
		t.Fatal(err)
	}
	echo(t, c, 1000)
}

// Not only an answer must come through, but that of the host's name server.
func TestNameserver(t *testing.T) {
	udp, tcp := serve(t, "udp", "127.0.0.1:0"), serve(t, "tcp", "127.0.0.1:0")
	var at atomic.Pointer[netip.AddrPort]
	at.Store(&udp)
	m := newMachine(t, netstack.Config{Nameserver: func() (netip.AddrPort, error) { return *at.Load(), nil }})
	to := netip.AddrPortFrom(netstack.Nameserver, 53).String()
	c, err := m.dial(t, "udp4", to)
	if err != nil {
		t.Fatal(err)
	}
	echoDatagram(t, c, 30)
	at.Store(&tcp)
	if c, err = m.dial(t, "tcp4", to); err != nil {
		t.Fatal(err)
	}
	echo(t, c, 30)
}

// Close ends what still runs, and waits for it.
func TestCloseEndsConnections(t *testing.T) {
	m := newMachine(t, netstack.Config{})
	l, err := net.Listen("tcp4", hostAddr+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := m.dial(t, "tcp4", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	closed := make(chan error, 1)
	go func() { closed <- m.stack.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Fatal("Close hangs")
	}
	_ = server.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := server.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection goes on after Close: %v", err)
	}
}
