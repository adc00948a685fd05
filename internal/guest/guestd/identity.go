package guestd

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"fcvm/internal/guest/proto"
)

// prepare writes the files that docker, too, makes for a container.
func (s *Server) prepare(spec proto.ContainerSpec) error {
	if err := os.MkdirAll(s.cfg.Etc, 0o755); err != nil {
		return fmt.Errorf("prepare container: %w", err)
	}
	var hosts strings.Builder
	hosts.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, h := range spec.ExtraHosts {
		name, ip, ok := strings.Cut(h, ":")
		if _, err := netip.ParseAddr(ip); !ok || err != nil || !validHostname(name) {
			return fmt.Errorf("extra host %q is not NAME:IP", h)
		}
		fmt.Fprintf(&hosts, "%s\t%s\n", ip, name)
	}
	if err := s.write("hosts", hosts.String()); err != nil {
		return err
	}
	name := spec.Hostname
	if name == "" {
		name = s.host()
	}
	if err := s.setHostname(name); err != nil {
		return err
	}
	servers := spec.Nameservers
	if len(servers) == 0 && s.cfg.Nameserver != "" {
		servers = []string{s.cfg.Nameserver}
	}
	if len(servers) == 0 {
		return nil
	}
	var resolv strings.Builder
	if len(spec.SearchDomains) > 0 {
		fmt.Fprintf(&resolv, "search %s\n", strings.Join(spec.SearchDomains, " "))
	}
	for _, ns := range servers {
		if _, err := netip.ParseAddr(ns); err != nil {
			return fmt.Errorf("name server %q is no IP address", ns)
		}
		fmt.Fprintf(&resolv, "nameserver %s\n", ns)
	}
	return s.write("resolv.conf", resolv.String())
}

func (s *Server) setHostname(name string) error {
	if !validHostname(name) {
		return fmt.Errorf("host name %q is not valid", name)
	}
	if err := s.cfg.System.SetHostname(name); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := s.write("hostname", name+"\n"); err != nil {
		return err
	}
	s.mu.Lock()
	s.hostname = name
	s.mu.Unlock()
	if s.cfg.Address == "" {
		return nil
	}
	old, err := os.ReadFile(s.etc("hosts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set host name: %w", err)
	}
	return s.write("hosts", renameHost(string(old), s.cfg.Address, name))
}

// renameHost replaces, or adds, the line of this machine's address in a hosts
// file.
func renameHost(hosts, address, name string) string {
	return otherHosts(hosts, address) + hostLine(address, name)
}

func hostLine(address, name string) string { return address + "\t" + name + "\n" }

// otherHosts is a hosts file without the line of this machine's address; a
// container may have changed the others.
func otherHosts(hosts, address string) string {
	var b strings.Builder
	for line := range strings.Lines(hosts) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == address {
			continue
		}
		b.WriteString(strings.TrimSuffix(line, "\n") + "\n")
	}
	return b.String()
}

// write replaces a file's content. The file stays the same one, so that a
// process that watches it sees the change; a symbolic link, which would lead to another
// file, is replaced.
func (s *Server) write(name, content string) error {
	path := s.etc(name)
	if err := makeRegular(path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// makeRegular removes what is not a file.
func makeRegular(path string) error {
	if fi, err := os.Lstat(path); err == nil && !fi.Mode().IsRegular() {
		return os.RemoveAll(path)
	}
	return nil
}

// validHostname follows hostname(7), and allows the underscores that people use.
func validHostname(name string) bool {
	if len(name) == 0 || len(name) > 64 {
		return false
	}
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_' {
			return false
		}
	}
	return true
}
