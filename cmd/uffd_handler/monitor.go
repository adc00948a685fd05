//go:build linux

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"
)

// monitorSlack is how much later than it asks for the kernel may wake the thread from
// which Go's runtime looks after its other threads (sysmon). That is every 20 µs as long as they
// do much, where each time takes several µs, and it takes from the threads that answer faults
// their places in the runtime's scheduler, and interrupts them. They have places enough, and
// seldom run anything else.
//
// Measured (make bench-pages, 8 clones, random order, (c) over (b), medians of runs): total time 1.02 to 1.13
// and once 1.23, with 1 ms in all threads 1.05 to 1.36.
const monitorSlack = 20 * time.Millisecond

// relaxMonitor sets that thread's timer slack (proc_pid_timerslack_ns(5), Linux 4.6), for which the
// kernel asks for CAP_SYS_NICE; without, faults take longer. Other threads must not have it:
// they pause, too, before they take over what one has made ready, and a fault that the disk
// answers would wait so long (p99.9 of 15 ms instead of 2). One that the monitor
// makes inherits it, which is seldom, as it takes one that is idle first.
func relaxMonitor(log *slog.Logger) {
	tid, err := monitor()
	if err == nil {
		err = os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", tid), strconv.AppendInt(nil, monitorSlack.Nanoseconds(), 10), 0)
	}
	if err != nil {
		log.Info("faults take some more processor time", "error", fmt.Errorf("set timer slack: %w", err))
	}
}

// monitor is the number of that thread. It is the first that the runtime makes (main in
// runtime/proc.go), and never ends; the kernel lists threads in the order in which they were made.
func monitor() (tid int, err error) {
	f, err := os.Open("/proc/self/task")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1) // not sorted
	if err != nil {
		return 0, err
	}
	if len(names) < 2 {
		return 0, errors.New("this program has but one thread")
	}
	return strconv.Atoi(names[1])
}
