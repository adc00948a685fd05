//go:build linux

package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
)

// Publish listens on all of these ports or, with an error, on none. What comes is
// sent to the guest from [Gateway]'s address. The ports are free again after Close.
func (s *Stack) Publish(ctx context.Context, ports []vmm.Port) error {
	if err := network.Check(ports); err != nil {
		return fmt.Errorf("publish ports: %w", err)
	}
	var opened []func()
	var serve []func()
	for _, p := range ports {
		run, end, err := s.listen(ctx, p)
		if err != nil {
			for _, end := range opened {
				end()
			}
			return network.ListenError(p, err)
		}
		opened, serve = append(opened, end), append(serve, run)
	}
	for i, run := range serve {
		stop := s.until(opened[i])
		go func() {
			defer stop()
			run()
		}()
	}
	return nil
}

// pause keeps what fails for a while from being tried all the time.
func (s *Stack) pause() {
	select {
	case <-s.ctx.Done():
	case <-time.After(50 * time.Millisecond):
	}
}

// listen opens a port; run serves it until end was called.
func (s *Stack) listen(ctx context.Context, p vmm.Port) (run, end func(), err error) {
	if p.HostPort == 0 {
		return nil, nil, errors.New("the host's port was not chosen")
	}
	proto, ip := p.Proto+"4", p.HostIP
	if a, err := netip.ParseAddr(ip); err == nil && a.Is6() && !a.Is4In6() {
		proto = p.Proto + "6"
	}
	addr := net.JoinHostPort(ip, strconv.Itoa(p.HostPort))
	guest := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(Guest.As4()), Port: uint16(p.GuestPort)}
	var lc net.ListenConfig
	if p.Proto == "udp" {
		c, err := lc.ListenPacket(ctx, proto, addr)
		if err != nil {
			return nil, nil, err
		}
		u := &udpPort{s: s, conn: c.(*net.UDPConn), guest: guest, flows: map[netip.AddrPort]net.Conn{}}
		return u.run, func() { _ = c.Close() }, nil
	}
	l, err := lc.Listen(ctx, proto, addr)
	if err != nil {
		return nil, nil, err
	}
	return func() { s.accept(l, guest) }, func() { l.Close() }, nil
}

// accept serves a published TCP port until its listener is closed.
func (s *Stack) accept(l net.Listener, guest tcpip.FullAddress) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of file descriptors, most likely: the next one may have more luck.
			s.pause()
			continue
		}
		stop := s.until(func() { _ = c.Close() })
		go func() {
			defer stop()
			defer c.Close()
			ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
			g, err := gonet.DialTCPWithBind(ctx, s.stack, gateway, guest, ipv4.ProtocolNumber)
			cancel()
			if err == nil {
				s.relay(g, c)
			}
		}()
	}
}

// gateway is the source of what is published.
var gateway = tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(Gateway.As4())}
