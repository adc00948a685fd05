//go:build !linux

// Kvmlab runs a command with a real /dev/kvm, on machines that have none.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "kvmlab: error: this needs Linux on x86-64")
	os.Exit(125)
}
