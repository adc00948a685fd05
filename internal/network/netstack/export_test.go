//go:build linux

package netstack

import "net/netip"

// Allowed tells whether a guest may send there.
func (s *Stack) Allowed(to netip.AddrPort) bool { return s.allowed(to) }
