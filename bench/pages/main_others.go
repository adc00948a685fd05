//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench-pages: error: userfaultfd is Linux's")
	os.Exit(1)
}
