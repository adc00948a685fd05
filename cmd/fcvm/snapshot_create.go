//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/snapshot"
	"fcvm/internal/ui"
)

func newSnapshotCreate(a *app) *cobra.Command {
	var name string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "create VM --name NAME",
		Short: "Snapshot a running VM",
		Long: `Write the memory and the devices of a running or paused VM to a snapshot. The VM
is paused for a moment, which is printed, and then goes on as it was.

A snapshot is there whole or not at all: when anything fails, nothing is left.`,
		Args:              exactly(1, "VM"),
		ValidArgsFunction: a.completeFirstVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.snapshotCreate(cmd.Context(), args[0], name, asJSON)
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the snapshot")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) snapshotCreate(ctx context.Context, vm, name string, asJSON bool) error {
	if name == "" {
		return &usageError{message: "missing --name", command: "fcvm snapshot create"}
	}
	if err := snapshot.CheckName(name); err != nil {
		return err
	}
	return a.withClient(ctx, func(c *api.Client) error {
		p := a.ui.Progress()
		defer p.Done()
		p.Set("snapshot", 0, 0)
		res, err := c.Snapshot(ctx, api.SnapshotRequest{VM: vm, Name: name})
		p.Done()
		if err != nil {
			return err
		}
		if asJSON {
			res.Version = api.SchemaVersion
			return a.ui.JSON(res)
		}
		a.ui.Say("paused for %s", ui.Millis(res.PauseMillis))
		a.ui.Note("%s of memory written, %s on disk, %s in all", ui.Size(res.PrivateBytes), ui.Size(res.DiskBytes), ui.Millis(res.TotalMillis))
		return a.ui.Println(res.Name)
	})
}
