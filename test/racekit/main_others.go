//go:build !linux

// Command racekit tests page servers. It needs Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "racekit: error: userfaultfd(2) is Linux's")
	os.Exit(1)
}
