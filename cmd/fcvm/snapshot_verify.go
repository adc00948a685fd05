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
	// WorkingSet is missing before a clone was recorded.
	WorkingSet *workingSetInfo `json:"working_set,omitempty"`
}

const snapshotVerifyLong = `Compare snapshots with their checksums: the memory, page by page, the device state
and the manifest. Where memory changed, the first such page is named.

A working set is no part of what is compared, since losing it costs clones speed
only; one that is unusable is told, and is no error.`

func newSnapshotVerify(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:               "verify SNAPSHOT...",
		Short:             "Compare snapshots with their checksums",
		Long:              snapshotVerifyLong,
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
		if err != nil {
			return err
		}
		s, err := store.Get(name)
		if err != nil {
			return err
		}
		ws := describeWorkingSet(s)
		if asJSON {
			return a.ui.JSON(verified{api.SchemaVersion, name, true, ws})
		}
		return a.ui.Println(name + ": all checksums match" + ws.note())
	})
}
