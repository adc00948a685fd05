//go:build linux

package netstack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/inetaf/tcpproxy"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// dialTimeout is for connections to the outside; Linux itself gives up after two
// minutes, when the guest has lost its patience.
const dialTimeout = 30 * time.Second

// connect answers a SYN of the guest, once it is known what the host's side says.
// It runs in a goroutine of its own.
func (s *Stack) connect(r *tcp.ForwarderRequest) {
	out, err := s.dial("tcp4", local(r.ID()))
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(false)
	if terr != nil {
		out.Close()
		return
	}
	s.relay(gonet.NewTCPConn(&wq, ep), out)
}

// dial connects to what the guest knows as to.
func (s *Stack) dial(network string, to netip.AddrPort) (net.Conn, error) {
	at, err := s.translate(to)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
	defer cancel()
	var d net.Dialer
	return d.DialContext(ctx, network, at.String())
}

// relay copies both ways between two connections, and closes both in the end.
func (s *Stack) relay(a, b net.Conn) {
	defer s.until(func() { a.Close(); b.Close() })()
	p := tcpproxy.DialProxy{DialContext: func(context.Context, string, string) (net.Conn, error) { return b, nil }}
	p.HandleConn(a)
}

// until has Close call end, and wait for the returned function to be called. Once
// it was called, end is so at once.
func (s *Stack) until(end func()) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		end()
		return func() {}
	}
	s.wg.Add(1)
	undo := context.AfterFunc(s.ctx, end)
	return func() { undo(); s.wg.Done() }
}

// hostNameserver is the first IPv4 one of /etc/resolv.conf; without any it is this
// host (resolv.conf(5)).
func hostNameserver() (netip.AddrPort, error) {
	f, err := os.Open("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return netip.AddrPort{}, fmt.Errorf("find a name server: %w", err)
	}
	if err == nil {
		defer f.Close()
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			words := strings.Fields(lines.Text())
			if len(words) < 2 || words[0] != "nameserver" {
				continue
			}
			if a, err := netip.ParseAddr(words[1]); err == nil && a.Is4() {
				return netip.AddrPortFrom(a, 53), nil
			}
		}
		if err := lines.Err(); err != nil {
			return netip.AddrPort{}, fmt.Errorf("find a name server: %w", err)
		}
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53), nil
}
