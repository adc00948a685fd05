//go:build linux

package main

import "github.com/spf13/cobra"

func newSnapshotRm(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "rm SNAPSHOT...",
		Short:             "Remove snapshots that have no clones",
		Args:              atLeast(1, "snapshot"),
		ValidArgsFunction: a.completeSnapshots,
		RunE:              func(_ *cobra.Command, args []string) error { return a.snapshotRm(args) },
	}
}

func (a *app) snapshotRm(names []string) error {
	store, err := a.snapshots()
	if err != nil {
		return err
	}
	return each(names, func(name string) error {
		if err := store.Remove(name); err != nil {
			return err
		}
		return a.ui.Println(name)
	})
}
