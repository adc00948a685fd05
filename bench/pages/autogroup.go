//go:build linux

package main

import (
	"fmt"
	"os"
)

// flat turns off, until undo, that the kernel shares processors out by session first
// (sched(7), "The autogroup feature"), which it does to processes in no control group. A page server
// beside its VMs in a service or a container is in one, and does without it. Where it
// cannot be turned off, that is said.
func flat() (undo func()) {
	const file = "/proc/sys/kernel/sched_autogroup_enabled"
	was, err := os.ReadFile(file)
	if err != nil || was[0] == '0' {
		return func() {}
	}
	if err := os.WriteFile(file, []byte("0"), 0); err != nil {
		fmt.Println("processors are shared out by session first, as there is no control group:", err)
		return func() {}
	}
	return func() { _ = os.WriteFile(file, was, 0) }
}
