//go:build !linux

// Fcvm-init needs Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "fcvm-init: error: fcvm needs Linux on x86-64, with userfaultfd and QEMU")
	os.Exit(1)
}
