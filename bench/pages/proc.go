//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what a process took so far.
type usage struct {
	cpu      time.Duration
	switches uint64
}

// usageOf returns nothing for pid 0.
func usageOf(pid int) (u usage, err error) {
	if pid == 0 {
		return u, nil
	}
	// The clock of another process (clock_getcpuclockid(3)) counts nanoseconds, where
	// /proc/PID/stat has ticks of 10 ms.
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|2, &ts); err != nil {
		return u, fmt.Errorf("read processor time of process %d: %w", pid, err)
	}
	u.cpu = time.Duration(ts.Nano())
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return u, err
	}
	for _, path := range tasks {
		status, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		u.switches += statusField(status, "voluntary_ctxt_switches") + statusField(status, "nonvoluntary_ctxt_switches")
	}
	return u, nil
}

func (u usage) minus(v usage) usage { return usage{u.cpu - v.cpu, u.switches - v.switches} }

// peakBytes is the most that a process held at any time (VmHWM).
func peakBytes(pid int) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	return int64(statusField(status, "VmHWM")) << 10, nil
}

// statusField returns a number in the format of /proc/PID/status, or 0.
func statusField(status []byte, name string) uint64 {
	for line := range bytes.Lines(status) {
		if k, v, ok := strings.Cut(string(line), ":"); ok && k == name {
			n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return n
		}
	}
	return 0
}

// prefer gives a process's session another nice level (sched(7), autogroup). That of
// the process itself would count within its session only, and for one thread.
func prefer(pid, nice int) error {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/autogroup", pid), []byte(strconv.Itoa(nice)), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("this kernel does not group processes by session: use nice(1) instead of -nice")
	}
	return err
}

// load is the machine's load average over the last minute.
func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(b), " ")
	return first
}
