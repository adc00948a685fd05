//go:build linux

package main

import (
	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/snapshot"
)

// snapshotDetails is the schema of snapshot inspect: the manifest, and where and
// how large the snapshot is.
type snapshotDetails struct {
	Version   int    `json:"version"`
	Dir       string `json:"dir"`
	DiskBytes int64  `json:"disk_bytes"`
	snapshot.Manifest
}

func newSnapshotInspect(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:               "inspect SNAPSHOT...",
		Short:             "Show all about snapshots, as JSON",
		Long:              "Show all about snapshots, as JSON: one object a snapshot, one after another.",
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
		return a.ui.JSON(snapshotDetails{api.SchemaVersion, s.Dir, s.DiskBytes(), s.Manifest})
	})
}
