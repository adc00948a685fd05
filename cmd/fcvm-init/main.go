//go:build linux

// Fcvm-init is the first process of every guest. It is never called by a person:
// `fcvm setup` packs it into the guest's initramfs.
package main

import (
	"fmt"
	"os"

	"fcvm/internal/buildinfo"
	"fcvm/internal/guest/boot"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "fcvm-init: error: this runs inside of VMs, as their first process\nfcvm-init: hint: fcvm run alpine")
		os.Exit(2)
	}
	boot.Run(boot.Container(buildinfo.Get()))
}
