//go:build linux

package main

import (
	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/snapshot"
)

// snapshotDetails is the schema of snapshot inspect: the manifest, where and how
// large the snapshot is, and its working set.
type snapshotDetails struct {
	Version   int    `json:"version"`
	Dir       string `json:"dir"`
	DiskBytes int64  `json:"disk_bytes"`
	// WorkingSet is missing before a clone was recorded.
	WorkingSet *workingSetInfo `json:"working_set,omitempty"`
	snapshot.Manifest
}

const snapshotInspectLong = `Show all about snapshots, as JSON: one object a snapshot, one after another.

"working_set" is there once clones were recorded: the pages that they had to wait
for, which later clones get before they ask. Its "hit_rate" is the part of these
waits that later clones are spared, between 0 and 1; it is known when clones were
seen that got the working set ("warm") and some that did not ("cold").`

func newSnapshotInspect(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:               "inspect SNAPSHOT...",
		Short:             "Show all about snapshots, as JSON",
		Long:              snapshotInspectLong,
		Args:              atLeast(1, "snapshot"),
		ValidArgsFunction: a.completeSnapshots,
		RunE:              func(_ *cobra.Command, args []string) error { return a.snapshotInspect(args) },
	}
	cmd.Flags().Bool("json", true, "print JSON, which inspect always does")
	return cmd
}

func (a *app) snapshotInspect(names []string) error {
	store, err := a.snapshots()
	if err != nil {
		return err
	}
	return each(names, func(name string) error {
		s, err := store.Get(name)
		if err != nil {
			return err
		}
		return a.ui.JSON(snapshotDetails{api.SchemaVersion, s.Dir, s.DiskBytes(), describeWorkingSet(s), s.Manifest})
	})
}
