//go:build linux

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
)

const (
	// minMemory is what Debian's kernel, the initramfs and the agent need to boot.
	minMemory = 128 << 20
	// memoryStep is what guest memory is a multiple of, see vmm.Machine.
	memoryStep = 2 << 20
	// maxCPUs is what QEMU's microvm and the kernels of distributions take.
	maxCPUs = 255
)

// parseMemory parses -m as docker does: a number and b, k, m, g or t. It rounds
// up to what guest memory is a multiple of.
func parseMemory(s string) (int64, error) {
	n, err := units.RAMInBytes(s)
	if err != nil {
		return 0, invalid("bad memory size %q: want a number with an optional unit b, k, m or g, as in 512m", s)
	}
	if n < minMemory {
		return 0, invalid("memory of %s is too little: a guest needs 128m or more", s)
	}
	if n > 1<<40 {
		return 0, invalid("memory of %s is too much: at most 1t", s)
	}
	return (n + memoryStep - 1) / memoryStep * memoryStep, nil
}

// maxSpares is more than anybody waits for; each costs some 14 MiB.
const maxSpares = 100

// parseSpares parses --spares.
func parseSpares(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > maxSpares {
		return 0, invalid("bad number of spares %q: want 0 to %d", s, maxSpares)
	}
	return n, nil
}

// parseCPUs parses --cpus. A guest has whole CPUs: a fraction would need a quota,
// which fcvm does not pretend to have.
func parseCPUs(s string) (float64, error) {
	n, err := strconv.ParseFloat(s, 64)
	switch {
	case err != nil || n != n:
		return 0, invalid("bad number of CPUs %q: want a whole number, as in --cpus 2", s)
	case n < 1:
		return 0, invalid("bad number of CPUs %q: a VM has 1 or more", s)
	case n > maxCPUs:
		return 0, invalid("bad number of CPUs %q: a VM has at most %d", s, maxCPUs)
	case n != float64(int(n)):
		return 0, invalid("bad number of CPUs %q: a VM has whole CPUs; take %d or %d", s, int(n), int(n)+1)
	}
	return n, nil
}

// parsePorts parses all values of -p.
func parsePorts(specs []string) ([]vmm.Port, error) {
	var ports []vmm.Port
	for _, spec := range specs {
		p, err := network.ParsePorts(spec)
		if err != nil {
			return nil, invalid("%v", err)
		}
		ports = append(ports, p...)
	}
	if err := network.Check(ports); err != nil {
		return nil, invalid("%v", err)
	}
	return ports, nil
}

// parseEnv resolves the values of --env-file and -e: files first, so that -e
// overrides them. A name alone takes its value from this environment, and is
// left out where it isn't set, as docker does.
func parseEnv(files, vars []string, lookup func(string) (string, bool)) ([]string, error) {
	var env []string
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return nil, invalid("read --env-file: %v", err)
		}
		lines, err := readEnvFile(f, path)
		f.Close()
		if err != nil {
			return nil, err
		}
		for _, l := range lines {
			env = appendEnv(env, l, lookup)
		}
	}
	for _, v := range vars {
		if name, _, _ := strings.Cut(v, "="); name == "" || strings.ContainsRune(v, 0) {
			return nil, invalid("bad environment variable %q: want NAME=value, or NAME to take it from here", v)
		}
		env = appendEnv(env, v, lookup)
	}
	return env, nil
}

func appendEnv(env []string, v string, lookup func(string) (string, bool)) []string {
	if strings.Contains(v, "=") {
		return append(env, v)
	}
	if value, ok := lookup(v); ok {
		return append(env, v+"="+value)
	}
	return env
}

// readEnvFile reads docker's format: a NAME=value or NAME a line, taken literally
// (quotes are part of the value); empty lines and those that begin with # are
// skipped.
func readEnvFile(r io.Reader, path string) ([]string, error) {
	var lines []string
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if n == 1 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		line = strings.TrimLeft(strings.TrimSuffix(line, "\r"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		name, _, _ := strings.Cut(line, "=")
		if name == "" || strings.ContainsAny(name, " \t") || strings.ContainsRune(line, 0) {
			return nil, invalid("%s: line %d: bad environment variable %q: want NAME=value", path, n, line)
		}
		lines = append(lines, line)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return lines, nil
}

var vmName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)

// checkVMName refuses a name before anything is downloaded for it. The supervisor
// has the last word.
func checkVMName(name string) error {
	if name != "" && !vmName.MatchString(name) {
		return invalid("bad name %q: use 1 to 63 letters, digits, _, . and -, starting with a letter or digit", name)
	}
	return nil
}

// parseSince parses --since: a time, or how long ago.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return t, nil
		}
	}
	if sec, err := strconv.ParseFloat(s, 64); err == nil && sec >= 0 && sec < 1<<40 {
		return time.UnixMicro(int64(sec * 1e6)), nil
	}
	return time.Time{}, invalid("bad time %q: want 10m, 2026-01-02T15:04:05 or seconds since 1970", s)
}

// parseTail parses --tail: a number of lines, or all, which is negative.
func parseTail(s string) (int, error) {
	if s == "all" {
		return -1, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return 0, invalid("bad number of lines %q: want a number, or all", s)
	}
	return n, nil
}

// parseSeconds parses a timeout: seconds, or a duration such as 1m30s.
func parseSeconds(s string) (time.Duration, error) {
	if sec, err := strconv.ParseFloat(s, 64); err == nil && sec >= 0 && sec < 1e9 {
		return time.Duration(sec * float64(time.Second)), nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, invalid("bad time %q: want seconds, or a duration as 1m30s", s)
	}
	return d, nil
}
