//go:build linux

package netstack

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// flowIdle ends a UDP flow in which nothing came or went. Routers that translate
	// addresses wait as long or longer (RFC 4787, 4.3: two minutes or more).
	flowIdle = 2 * time.Minute
	// maxDatagram is the most that UDP over IPv4 carries. Memory that nothing was
	// ever read into is not there.
	maxDatagram = 65507
)

// exchange begins a UDP flow of the guest's: from one of its ports to one
// destination.
func (s *Stack) exchange(r *udp.ForwarderRequest) {
	if !s.takeFlow() {
		return // as a router does that is out of memory
	}
	to := local(r.ID())
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	if terr != nil {
		s.giveFlow()
		return
	}
	guest := gonet.NewUDPConn(&wq, ep)
	done := s.until(func() { _ = guest.Close() })
	go func() {
		defer done()
		defer s.giveFlow()
		defer func() { _ = guest.Close() }()
		out, err := s.dial("udp4", to)
		if err != nil {
			return
		}
		defer s.until(func() { out.Close() })()
		defer out.Close()
		both := sides{guest, out}
		back := make(chan struct{})
		go func() {
			defer close(back)
			defer func() { _ = guest.Close() }()
			both.copy(guest, out)
		}()
		both.copy(out, guest)
		out.Close()
		<-back
	}()
}

func (s *Stack) takeFlow() bool {
	select {
	case s.flows <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s *Stack) giveFlow() { <-s.flows }

// sides are the connections whose deadlines a flow has to care for.
type sides []net.Conn

// extend lets the flow live on.
func (p sides) extend() {
	t := time.Now().Add(flowIdle)
	for _, c := range p {
		_ = c.SetReadDeadline(t)
	}
}

// copy copies datagrams until one side is closed or idle.
func (p sides) copy(to, from net.Conn) {
	p.extend()
	b := make([]byte, maxDatagram)
	for {
		n, err := from.Read(b)
		if err != nil {
			// Also when nobody listens there: the next datagram begins a new flow.
			return
		}
		p.extend()
		_, _ = to.Write(b[:n]) // one that is lost is UDP's business
	}
}

// udpPort is a published UDP port.
type udpPort struct {
	s     *Stack
	conn  *net.UDPConn
	guest tcpip.FullAddress

	mu    sync.Mutex                  // guards flows
	flows map[netip.AddrPort]net.Conn // to the guest, by who sends
}

// run serves the port until its socket is closed.
func (u *udpPort) run() {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer u.closeFlows()
	b := make([]byte, maxDatagram)
	for {
		n, from, err := u.conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			u.s.pause()
			continue
		}
		u.mu.Lock()
		c := u.flows[from]
		u.mu.Unlock()
		if c == nil {
			if c = u.open(); c == nil {
				continue
			}
			u.mu.Lock()
			u.flows[from] = c
			u.mu.Unlock()
			wg.Go(func() { u.answer(from, c) })
		}
		sides{c}.extend()
		_, _ = c.Write(b[:n])
	}
}

// open begins a flow to the guest, or returns nil: the datagram is lost then.
func (u *udpPort) open() net.Conn {
	if !u.s.takeFlow() {
		return nil
	}
	from := gateway
	c, err := gonet.DialUDP(u.s.stack, &from, &u.guest, ipv4.ProtocolNumber)
	if err != nil {
		u.s.giveFlow()
		return nil
	}
	return c
}

// answer sends back what the guest says in one flow.
func (u *udpPort) answer(to netip.AddrPort, c net.Conn) {
	defer u.s.giveFlow()
	b := make([]byte, maxDatagram)
	for {
		n, err := c.Read(b)
		if err != nil {
			break
		}
		sides{c}.extend()
		_, _ = u.conn.WriteToUDPAddrPort(b[:n], to)
	}
	u.mu.Lock()
	delete(u.flows, to)
	u.mu.Unlock()
	_ = c.Close()
}

func (u *udpPort) closeFlows() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, c := range u.flows {
		_ = c.Close()
	}
}
