//go:build linux

// Package netstack is the user-mode network behind a VM's TAP: a TCP/IP stack of
// its own (gVisor's) that talks to the guest in Ethernet frames, and to everybody
// else through plain sockets of this process. So the guest reaches what this process
// reaches, and needs neither routes, nor addresses, nor rules on the host.
//
// All guests see the same network, because a clone goes on with its golden VM's
// address, and with the router's address in its ARP cache: [Guest], [Gateway] and
// [Nameserver], as QEMU's own user-mode network has them. Two stacks know nothing of each
// other, so there is no way from one VM to another but through a published port.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// The guest's network, the same for each VM.
var (
	// Subnet is what the guest believes to be its neighbourhood.
	Subnet = netip.MustParsePrefix("10.0.2.0/24")
	// Gateway answers for everything outside; by itself it is nobody.
	Gateway = netip.MustParseAddr("10.0.2.2")
	// Nameserver stands for the host's own name server.
	Nameserver = netip.MustParseAddr("10.0.2.3")
	// Guest is the VM.
	Guest = netip.MustParseAddr("10.0.2.15")
)

const (
	// gatewayMAC must not change: clones find it in their ARP caches. It is a locally
	// administered address (IEEE 802, second bit of the first byte).
	gatewayMAC = "\x02\xfc\x00\x00\x00\x02"
	// MTU of the guest's interface, in bytes.
	MTU = 1500
	// maxSegment is what is given to the kernel at once, to be cut by it or, where the
	// guest can, by nobody.
	maxSegment = 65535

	nic = 1
	// maxConnecting bounds the connections that the guest waits for.
	maxConnecting = 512
	// maxFlows bounds the UDP flows of one VM: each holds a socket and two buffers.
	maxFlows = 1024
)

// Config says what a guest may reach, and how.
type Config struct {
	// HostLoopback lets the guest reach the host's 127.0.0.1, as [Gateway].
	HostLoopback bool
	// Nameserver of the host, asked for anew for each connection. Nil means the
	// first one of /etc/resolv.conf.
	Nameserver func() (netip.AddrPort, error)
}

// Stack is the network of one VM. Its methods may be called concurrently.
type Stack struct {
	config Config
	stack  *stack.Stack
	link   stack.LinkEndpoint
	file   *os.File
	flows  chan struct{} // holds one for each UDP flow

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu     sync.Mutex     // guards closed, and that wg grows only before it is set
	closed bool           // by Close
	wg     sync.WaitGroup // whatever serves connections
}

// New starts a stack on a packet socket (packet(7), SOCK_RAW) that is bound to the
// VM's TAP, and takes over the file, also when it fails.
func New(link *os.File, c Config) (_ *Stack, err error) {
	defer func() {
		if err != nil {
			_ = link.Close()
			err = fmt.Errorf("start user-mode network: %w", err)
		}
	}()
	if c.Nameserver == nil {
		c.Nameserver = hostNameserver
	}
	fd := int(link.Fd())
	// Guests and VMMs leave cutting and checksums of TCP to whoever is next; this header
	// tells of it, in both directions. What comes from a guest has no checksum to be
	// checked: it never was on a wire.
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return nil, fmt.Errorf("set up packet socket: %w", err)
	}
	ep, err := fdbased.New(&fdbased.Options{
		FDs:                  []int{fd},
		MTU:                  MTU,
		EthernetHeader:       true,
		Address:              tcpip.LinkAddress(gatewayMAC),
		PacketDispatchMode:   fdbased.RecvMMsg,
		GSOMaxSize:           maxSegment,
		RXChecksumOffload:    true,
		ProcessorsPerChannel: 1,
	})
	if err != nil {
		return nil, err
	}
	s := &Stack{config: c, link: ep, file: link, flows: make(chan struct{}, maxFlows)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if err := s.build(); err != nil {
		s.cancel()
		return nil, err
	}
	go func() { // ends with the interface
		s.link.Wait()
		_ = s.file.Close()
	}()
	return s, nil
}

func (s *Stack) build() error {
	s.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	sack := tcpip.TCPSACKEnabled(true)
	if err := s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack); err != nil {
		return fmt.Errorf("set up TCP: %s", err)
	}
	tcpF := tcp.NewForwarder(s.stack, 0, maxConnecting, s.connect)
	udpF := udp.NewForwarder(s.stack, s.exchange)
	// What is refused here is answered by a reset, or that the port is unreachable.
	s.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, p *stack.PacketBuffer) bool {
		return s.allowed(local(id)) && tcpF.HandlePacket(id, p)
	})
	s.stack.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, p *stack.PacketBuffer) bool {
		return s.allowed(local(id)) && udpF.HandlePacket(id, p)
	})
	// The guest's first packet is received as soon as there is a NIC.
	if err := s.stack.CreateNICWithOptions(nic, s.link, stack.NICOptions{Disabled: true}); err != nil {
		return fmt.Errorf("attach to the TAP: %s", err)
	}
	// A guest that is paused, or slow, is waited for as long as for any other answer, instead
	// of three seconds.
	nud := stack.DefaultNUDConfigurations()
	nud.MaxMulticastProbes = uint32(dialTimeout / nud.RetransmitTimer)
	nud.MaxUnicastProbes = nud.MaxMulticastProbes
	if err := s.stack.SetNUDConfigurations(nic, ipv4.ProtocolNumber, nud); err != nil {
		return fmt.Errorf("set up ARP: %s", err)
	}
	for _, a := range []netip.Addr{Gateway, Nameserver} {
		addr := tcpip.ProtocolAddress{
			Protocol:          header.IPv4ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(a.As4()), PrefixLen: Subnet.Bits()},
		}
		if err := s.stack.AddProtocolAddress(nic, addr, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("add address %s: %s", a, err)
		}
	}
	// Whomever the guest sends to, it reaches this stack, which answers in that name.
	if err := s.stack.SetPromiscuousMode(nic, true); err != nil {
		return fmt.Errorf("receive for all addresses: %s", err)
	}
	if err := s.stack.SetSpoofing(nic, true); err != nil {
		return fmt.Errorf("send for all addresses: %s", err)
	}
	s.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})
	if err := s.stack.EnableNIC(nic); err != nil {
		return fmt.Errorf("start: %s", err)
	}
	return nil
}

// Close ends all connections, and returns when their sockets are closed. Only the
// first call does anything.
//
// The packet socket is read, and forgotten, until its interface is gone: gVisor's link can be
// detached only from an interface from which nothing comes just then. If a packet does, that waits
// for ever (fdbased.endpoint.Attach holds the lock for which its reader then waits).
func (s *Stack) Close() error {
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	if again {
		return nil
	}
	s.cancel()
	s.wg.Wait()
	s.stack.Close()
	if err := s.stack.DisableNIC(nic); err != nil {
		return fmt.Errorf("end user-mode network: %s", err)
	}
	return nil
}

// local is whom a packet was sent to.
func local(id stack.TransportEndpointID) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(id.LocalAddress.As4()), id.LocalPort)
}

// errRefused is for destinations that guests must not reach.
var errRefused = errors.New("not allowed")

func (s *Stack) allowed(to netip.AddrPort) bool {
	_, err := s.translate(to)
	return !errors.Is(err, errRefused)
}

// translate returns where on the host's side a destination of the guest's is.
func (s *Stack) translate(to netip.AddrPort) (netip.AddrPort, error) {
	a := to.Addr()
	switch {
	case a == Nameserver && to.Port() == 53:
		return s.config.Nameserver()
	case a == Gateway && s.config.HostLoopback:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), to.Port()), nil
	case Subnet.Contains(a),
		// To Linux 0.0.0.0, and all of 0.0.0.0/8 to some others, is the host itself.
		a.As4()[0] == 0, a.IsLoopback(),
		// Where clouds tell a machine its own secrets.
		a.IsLinkLocalUnicast(),
		// Multicast, reserved, broadcast.
		a.As4()[0] >= 224:
		return netip.AddrPort{}, errRefused
	}
	return to, nil
}
