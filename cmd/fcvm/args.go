//go:build linux

package main

import (
	"github.com/spf13/cobra"
)

// bothSides lets flags stand on either side of a command's first argument, and
// leaves everything from the second argument on alone: `run nginx --name golden`
// and `run --rm alpine ls -la /` both mean what they say. The command must get
// its arguments through splitArgs.
func bothSides(cmd *cobra.Command) {
	cmd.Flags().SetInterspersed(false)
}

// splitArgs returns the first argument, which is called what, and the command
// that follows it. Flags between the two are parsed.
func splitArgs(cmd *cobra.Command, args []string, what string) (first string, rest []string, err error) {
	if len(args) == 0 || args[0] == "" {
		return "", nil, &usageError{message: "missing " + what, command: cmd.CommandPath()}
	}
	// Flags keep the values of the first pass, and lists go on growing.
	if err := cmd.Flags().Parse(args[1:]); err != nil {
		return "", nil, &usageError{message: err.Error(), command: cmd.CommandPath()}
	}
	return args[0], cmd.Flags().Args(), nil
}

// helpAsked tells whether --help stood behind the first argument.
func helpAsked(cmd *cobra.Command) bool {
	asked, err := cmd.Flags().GetBool("help")
	return err == nil && asked
}

// asProcess makes a command's errors exit 125, so that they can be told from the
// exit codes of the process that it runs.
func asProcess(run func(cmd *cobra.Command, args []string) error) func(cmd *cobra.Command, args []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := run(cmd, args); err != nil {
			return &ownError{err}
		}
		return nil
	}
}

// processFlags makes errors in the flags of run and exec exit 125, as docker.
func processFlags(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &ownError{&usageError{message: err.Error(), command: cmd.CommandPath()}}
	})
}
