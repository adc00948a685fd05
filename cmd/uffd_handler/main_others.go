//go:build !linux

// Command uffd_handler serves the memory of microVMs. It runs on Linux only.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "uffd_handler: error: needs Linux 5.11 or later with userfaultfd")
	os.Exit(1)
}
