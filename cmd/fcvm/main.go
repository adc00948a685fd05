//go:build linux

package main

import (
	"os"

	"fcvm/internal/network/netmain"
	"fcvm/internal/ui"
	"fcvm/internal/vmm/merge"
)

func main() {
	merge.Main()
	netmain.Intercept()
	os.Exit(run(os.Args[1:], os.Stdin, ui.New(os.Stdout, os.Stderr)))
}

// run runs one command and returns the exit code of the process.
func run(args []string, in *os.File, u *ui.UI) int {
	intr := newInterrupts()
	defer intr.close()
	a := &app{ui: u, in: in, intr: intr}
	root := newRoot(a)
	root.SetArgs(args)
	err := root.ExecuteContext(intr.ctx)
	return a.report(err, intr.signal(), wantsJSON(args))
}
