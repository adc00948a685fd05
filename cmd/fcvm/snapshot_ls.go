//go:build linux

package main

import (
	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/ui"
)

// snapshotList is the schema of snapshot ls --json.
type snapshotList struct {
	Version   int               `json:"version"`
	Snapshots []snapshotSummary `json:"snapshots"`
}

func newSnapshotLs(a *app) *cobra.Command {
	var quiet, asJSON bool
	cmd := &cobra.Command{
		Use:   "ls [flags]",
		Short: "List snapshots",
		Args:  exactly(0, ""),
		RunE:  func(*cobra.Command, []string) error { return a.snapshotLs(quiet, asJSON) },
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print names only")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) snapshotLs(quiet, asJSON bool) error {
	store, err := a.snapshots()
	if err != nil {
		return err
	}
	listed, err := store.List()
	if err != nil {
		return err
	}
	list := snapshotList{Version: api.SchemaVersion, Snapshots: []snapshotSummary{}}
	for _, l := range listed {
		list.Snapshots = append(list.Snapshots, summarize(l))
	}
	switch {
	case asJSON:
		return a.ui.JSON(list)
	case quiet:
		for _, s := range list.Snapshots {
			if err := a.ui.Println(s.Name); err != nil {
				return err
			}
		}
		return nil
	}
	rows := make([][]string, 0, len(list.Snapshots))
	for _, s := range list.Snapshots {
		if s.Error != "" {
			rows = append(rows, []string{s.Name, s.Error})
			continue
		}
		rows = append(rows, []string{s.Name, s.Image, ui.Age(s.Created), ui.Size(s.MemoryBytes), ui.Size(s.DiskBytes), s.Engine, s.Parent})
	}
	return a.ui.Table([]string{"NAME", "IMAGE", "CREATED", "MEMORY", "DISK", "ENGINE", "PARENT"}, rows)
}
