//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

// verified is the schema of snapshot verify --json: one object a snapshot.
type verified struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
}

func newSnapshotVerify(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:               "verify SNAPSHOT...",
		Short:             "Compare snapshots with their checksums",
		Args:              atLeast(1, "snapshot"),
		ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.snapshotVerify(cmd.Context(), args, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) snapshotVerify(ctx context.Context, names []string, asJSON bool) error {
	store, err := a.snapshots()
	if err != nil {
		return err
	}
	return each(names, func(name string) error {
		p := a.ui.Progress()
		err := store.Verify(ctx, name, func(done, total int64) { p.Set("verify "+name, done, total) })
		p.Done()
		switch {
		case err != nil:
			return err
		case asJSON:
			return a.ui.JSON(verified{api.SchemaVersion, name, true})
		}
		return a.ui.Println(name + ": all checksums match")
	})
}
