package qemu

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/vmlog"
)

// logs returns the end of what QEMU and the guest's console printed.
func logs(dir string) string {
	var parts []string
	for _, log := range []struct {
		name  string
		lines int
	}{{vmmLog, 8}, {consoleLog, 12}} {
		if t := tail(filepath.Join(dir, log.name), 0, log.lines); t != "" {
			parts = append(parts, t)
		}
	}
	return strings.Join(parts, "\n")
}

// tail is of a log of QEMU's or its guest's. QEMU says at each start that it waits
// for the agent's connection.
func tail(path string, skip int64, lines int) string {
	return vmlog.Tail(path, skip, lines, ": info: QEMU waiting for connection on: ")
}

var forwardFailed = regexp.MustCompile(`Could not set up host forwarding rule '(tcp|udp):[^:']*:(\d+)-`)

// explainPort returns an error that a person understands when QEMU ended
// because it could not publish a port. QEMU does not say why, so the port is
// tried here.
func explainPort(ports []vmm.Port, said string) error {
	m := forwardFailed.FindStringSubmatch(said)
	if m == nil {
		return nil
	}
	for _, p := range ports {
		if p.Proto != m[1] || strconv.Itoa(p.HostPort) != m[2] {
			continue
		}
		why := "QEMU could not listen there"
		if err := tryPort(p); err != nil {
			why = err.Error()
		}
		return fmt.Errorf("publish port %d/%s: %s", p.HostPort, p.Proto, why)
	}
	return fmt.Errorf("publish port %s/%s: QEMU could not listen there", m[2], m[1])
}

func tryPort(p vmm.Port) error {
	host := p.HostIP
	if host == "" {
		host = "0.0.0.0"
	}
	addr := net.JoinHostPort(host, strconv.Itoa(p.HostPort))
	if p.Proto == "udp" {
		c, err := net.ListenPacket("udp4", addr)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen("tcp4", addr)
	if err != nil {
		return err
	}
	return l.Close()
}
