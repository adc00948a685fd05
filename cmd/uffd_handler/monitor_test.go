//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The thread that is taken for the runtime's monitor does what only that does: as long as
// a goroutine runs, it sleeps, and does nothing else.
func TestMonitor(t *testing.T) {
	tid, err := monitor()
	if err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	defer done.Store(true)
	go func() {
		for !done.Load() {
		}
	}()
	sleeping := fmt.Sprintf("%d ", unix.SYS_NANOSLEEP)
	var slept, others int
	for end := time.Now().Add(10 * time.Second); slept < 100 && time.Now().Before(end); {
		text, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		if err != nil {
			t.Skip(err) // a kernel without CONFIG_HAVE_ARCH_TRACEHOOK
		}
		switch s := string(text); {
		case strings.HasPrefix(s, sleeping):
			slept++
		case !strings.HasPrefix(s, "running"):
			others++
		}
	}
	if slept < 100 || others > slept/10 {
		t.Errorf("thread %d was seen to sleep %d times, and %d times in other system calls", tid, slept, others)
	}
}

// That thread of the program may be woken late, and others may not, but for what it made.
func TestOnlyTheMonitorIsRelaxed(t *testing.T) {
	d := dir(t)
	cmd, _ := start(t, filepath.Join(d, "s"), memFile(t, d, 1<<20))
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", cmd.Process.Pid))
	if err != nil || len(tasks) < 2 {
		t.Fatalf("%d threads, error %v", len(tasks), err)
	}
	relaxed := 0
	for _, task := range tasks {
		slack, err := os.ReadFile(filepath.Join("/proc", filepath.Base(task), "timerslack_ns"))
		if err != nil {
			t.Skip(err) // to look takes CAP_SYS_NICE, as setting it does
		}
		if string(slack) == fmt.Sprintln(monitorSlack.Nanoseconds()) {
			relaxed++
		}
	}
	if relaxed < 1 || relaxed > 1+len(tasks)/4 {
		t.Errorf("%d threads of %d have a slack of %v", relaxed, len(tasks), monitorSlack)
	}
}
