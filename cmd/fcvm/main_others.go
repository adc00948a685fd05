//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "fcvm: error: fcvm needs Linux on x86-64, with userfaultfd and QEMU; it uses KVM where there is one")
	os.Exit(1)
}
