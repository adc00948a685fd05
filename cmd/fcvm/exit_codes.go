//go:build linux

package main

import "github.com/spf13/cobra"

const exitCodesLong = `fcvm exits with these codes:

    0      done
    1      something else went wrong
    2      the command line or the request is wrong
    3      no such VM, snapshot or image
    4      a name or a port is taken, or something is in use
    5      this machine, or a registry, lacks something that is needed
    6      the VM is not in a state that allows it
    7      a snapshot or an image is damaged
    128+n  ended by signal n, as 130 by Ctrl-C

run and exec exit as their process does; these codes tell what is not the process's:

    125    any of 1 to 7
    126    the command cannot be executed
    127    the command was not found

With --json an error is an object on standard error, whose fields are version,
code (internal, invalid, not_found, conflict, unavailable, state, damaged,
interrupted), message, hint and exit_code.`

// newExitCodes returns a help topic: a command that can't be run.
func newExitCodes() *cobra.Command {
	return &cobra.Command{Use: "exit-codes", Short: "What exit codes mean", Long: exitCodesLong}
}
