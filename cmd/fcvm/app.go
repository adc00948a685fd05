//go:build linux

package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/buildinfo"
	"fcvm/internal/datadir"
	"fcvm/internal/ui"
)

// app is what all commands share. It is made anew for each run of the program.
type app struct {
	ui      *ui.UI
	in      *os.File
	intr    *interrupts
	dataDir string
}

const rootLong = `fcvm runs OCI images in microVMs, snapshots a running VM, and clones the
snapshot many times so that the clones share memory page by page.

    fcvm setup                                       once per machine
    fcvm run -d -p 8080:80 --name golden nginx       a VM from an image
    fcvm snapshot create golden --name nginx-base    its memory and devices
    fcvm clone --snapshot nginx-base --name web -n 10
    fcvm stats                                       what the clones share
`

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "fcvm",
		Short:         "Run container images in microVMs, snapshot them, clone them with shared memory",
		Long:          rootLong,
		Args:          noSubcommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
		// Suggestions come as a hint, from noSubcommand.
		DisableSuggestions: true,
	}
	root.SetOut(a.ui.Out)
	root.SetErr(a.ui.Err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{message: err.Error(), command: cmd.CommandPath()}
	})
	root.PersistentFlags().StringVar(&a.dataDir, "data-dir", "",
		"keep images, snapshots and VMs in `DIR` (default: $FCVM_DATA_DIR, /var/lib/fcvm for root, or $XDG_DATA_HOME/fcvm)")
	root.CompletionOptions.HiddenDefaultCmd = false

	root.AddGroup(
		&cobra.Group{ID: groupVM, Title: "VMs:"},
		&cobra.Group{ID: groupStore, Title: "Images and snapshots:"},
		&cobra.Group{ID: groupHost, Title: "This machine:"},
	)
	for _, c := range []*cobra.Command{
		newRun(a), newClone(a), newLs(a), newLogs(a), newExec(a), newInspect(a), newStop(a),
		newKill(a), newRm(a), newWait(a), newPause(a), newResume(a), newStats(a), newMap(a), newCp(a),
	} {
		c.GroupID = groupVM
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{newImage(a), newSnapshot(a)} {
		c.GroupID = groupStore
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{newSetup(a), newDoctor(a), newServe(a), newMetrics(a), newVersion(a)} {
		c.GroupID = groupHost
		root.AddCommand(c)
	}
	root.AddCommand(newExitCodes())
	root.SetCompletionCommandGroupID(groupHost)
	root.SetHelpCommandGroupID(groupHost)
	return root
}

const (
	groupVM    = "vm"
	groupStore = "store"
	groupHost  = "host"
)

// newGroup returns a command that only has sub-commands.
func newGroup(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  noSubcommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(sub...)
	return c
}

// noSubcommand refuses arguments where a sub-command should stand.
func noSubcommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	e := &usageError{message: "unknown command " + quote(args[0]), command: cmd.CommandPath()}
	if cmd.SuggestionsMinimumDistance == 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		e.hint = "did you mean `" + cmd.CommandPath() + " " + near[0] + "`?"
	}
	return e
}

// atLeast wants n arguments or more, which are called what.
func atLeast(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return &usageError{message: "missing " + what, command: cmd.CommandPath()}
		}
		return nil
	}
}

// exactly wants n arguments, which are called what.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := atLeast(n, what)(cmd, args); err != nil {
			return err
		}
		if len(args) > n {
			return &usageError{message: "unexpected argument " + quote(args[n]), command: cmd.CommandPath()}
		}
		return nil
	}
}

func (a *app) layout() (*datadir.Layout, error) { return datadir.Open(a.dataDir) }

// dial connects to the supervisor, and starts one where none runs.
func (a *app) dial(ctx context.Context) (*api.Client, error) {
	l, err := a.layout()
	if err != nil {
		return nil, err
	}
	return api.Dial(ctx, l, api.DialOptions{Start: true, Version: buildinfo.Get()})
}

// withClient calls f with a client that is closed afterwards.
func (a *app) withClient(ctx context.Context, f func(*api.Client) error) error {
	c, err := a.dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	return f(c)
}

// warn prints what VMs warn of, each text once.
func (a *app) warn(vms ...api.VM) {
	seen := map[string]bool{}
	for _, vm := range vms {
		for _, w := range vm.Warnings {
			if !seen[w] {
				seen[w] = true
				a.ui.Warn(w)
			}
		}
	}
}

// wantsJSON tells whether the arguments ask for JSON: errors in the arguments
// themselves are then JSON, too. run and exec have no --json, and what follows
// belongs to their command.
func wantsJSON(args []string) bool {
	for _, arg := range args {
		switch arg {
		case "run", "exec", "--":
			return false
		case "--json", "--json=true":
			return true
		}
	}
	return false
}
