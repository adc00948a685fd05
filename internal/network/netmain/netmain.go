//go:build linux

// Package netmain is the hidden command of fcvm that is a VM's network, and the
// beginning of its VMM. Programs that start VMs, tests among them, call [Intercept]
// first, because it is they that are started again for it (package tapnet).
package netmain

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"fcvm/internal/network/netstack"
	"fcvm/internal/network/tapnet"
)

// What belongs to the process's first thread is arranged before there are others.
func init() {
	if wanted() {
		runtime.LockOSThread()
	}
}

func wanted() bool { return len(os.Args) > 2 && os.Args[1] == tapnet.Command }

// Intercept runs the command and ends the process, if the command line asks for it.
func Intercept() {
	if !wanted() {
		return
	}
	var err error
	switch os.Args[2] {
	case tapnet.Enter:
		err = tapnet.RunEnter(os.Args[3:])
	case tapnet.Serve:
		runtime.UnlockOSThread()
		// One for each VM: memory counts more than time.
		debug.SetGCPercent(50)
		err = tapnet.RunServe(os.Args[3:], func(packets *os.File, host bool) (tapnet.Publisher, error) {
			return netstack.New(packets, netstack.Config{HostLoopback: host})
		})
	default:
		err = fmt.Errorf("%s %s: this command is for fcvm itself", tapnet.Command, os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fcvm: network:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
