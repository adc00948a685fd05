// Package network knows about published ports: how people write them, which are
// free, and which VM holds them.
package network

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/docker/go-connections/nat"

	"fcvm/internal/vmm"
)

// MaxPorts is the most ports one VM may publish: each is a listening socket in
// its VMM.
const MaxPorts = 256

// ParsePorts parses one value of -p, as docker writes it:
// [[IP:][HOST]:]GUEST[/tcp|udp], where HOST and GUEST may be ranges of the same
// length. A missing HOST is 0: the host chooses.
func ParsePorts(spec string) ([]vmm.Port, error) {
	mappings, err := nat.ParsePortSpec(spec)
	if err != nil {
		return nil, fmt.Errorf("bad port %q: %w; write [[IP:]HOST:]GUEST[/udp], as in 8080:80", spec, err)
	}
	if len(mappings) > MaxPorts {
		return nil, fmt.Errorf("bad port %q: a range of %d ports is over the limit of %d", spec, len(mappings), MaxPorts)
	}
	ports := make([]vmm.Port, 0, len(mappings))
	for _, m := range mappings {
		p := vmm.Port{HostIP: m.Binding.HostIP, GuestPort: m.Port.Int(), Proto: m.Port.Proto()}
		if h := m.Binding.HostPort; h != "" {
			if p.HostPort, err = strconv.Atoi(h); err != nil {
				return nil, fmt.Errorf("bad port %q: a range of host ports needs as many guest ports", spec)
			}
		}
		ports = append(ports, p)
	}
	if err := Check(ports); err != nil {
		return nil, fmt.Errorf("bad port %q: %w", spec, err)
	}
	return ports, nil
}

// Check says whether these ports could be published together on some host.
func Check(ports []vmm.Port) error {
	if len(ports) > MaxPorts {
		return fmt.Errorf("%d ports are over the limit of %d", len(ports), MaxPorts)
	}
	for i, p := range ports {
		if p.Proto != "tcp" && p.Proto != "udp" {
			return fmt.Errorf("protocol %q is neither tcp nor udp", p.Proto)
		}
		if p.GuestPort < 1 || p.GuestPort > 65535 {
			return fmt.Errorf("guest port %d is not between 1 and 65535", p.GuestPort)
		}
		if p.HostPort < 0 || p.HostPort > 65535 {
			return fmt.Errorf("host port %d is not between 1 and 65535", p.HostPort)
		}
		if p.HostIP != "" {
			if a, err := netip.ParseAddr(p.HostIP); err != nil || a.Zone() != "" {
				return fmt.Errorf("host address %q is not an IP address", p.HostIP)
			}
		}
		for _, q := range ports[:i] {
			if overlap(p, q) {
				return fmt.Errorf("host port %s is published twice", HostAddr(p))
			}
		}
	}
	return nil
}

// Shift returns ports with every given host port n higher.
func Shift(ports []vmm.Port, n int) ([]vmm.Port, error) {
	out := make([]vmm.Port, len(ports))
	for i, p := range ports {
		if p.HostPort != 0 {
			p.HostPort += n
		}
		out[i] = p
	}
	return out, Check(out)
}

// HostAddr formats the host's side of a port for people: "8080",
// "127.0.0.1:8080", "[::1]:53/udp".
func HostAddr(p vmm.Port) string {
	s := strconv.Itoa(p.HostPort)
	if p.HostIP != "" {
		s = net.JoinHostPort(p.HostIP, s)
	}
	if p.Proto == "udp" {
		s += "/udp"
	}
	return s
}

// overlap says whether one listener would keep the other from listening.
func overlap(p, q vmm.Port) bool {
	if p.HostPort == 0 || p.HostPort != q.HostPort || p.Proto != q.Proto {
		return false
	}
	return p.HostIP == q.HostIP || wildcard(p.HostIP) || wildcard(q.HostIP)
}

func wildcard(ip string) bool {
	return ip == "" || strings.Trim(ip, "0.:") == ""
}
