package qemu

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"fcvm/internal/vmm"
)

// tailBytes is how much of a log's end is looked at.
const tailBytes = 8 << 10

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

// tail returns the last lines of a file, as far as they are behind the first
// skip bytes, or nothing where it can't be read. A guest writes what it likes to its console, so only printable characters get
// through to a terminal.
func tail(path string, skip int64, lines int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	from := max(skip, info.Size()-tailBytes)
	b, err := io.ReadAll(io.NewSectionReader(f, from, tailBytes))
	if err != nil {
		return ""
	}
	all := strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' || r == '\r' })
	if from > skip && len(all) > 1 {
		all = all[1:] // begins in the middle
	}
	// QEMU says at each start that it waits for the agent's connection.
	all = slices.DeleteFunc(all, func(l string) bool { return strings.Contains(l, ": info: QEMU waiting for connection on: ") })
	all = all[max(0, len(all)-lines):]
	for i, l := range all {
		all[i] = strings.TrimSpace(strings.Map(printable, l))
	}
	return strings.TrimSpace(strings.Join(all, "\n"))
}

func printable(r rune) rune {
	switch {
	case r == '\t':
		return ' '
	case r == unicode.ReplacementChar || !unicode.IsPrint(r):
		return -1
	}
	return r
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
