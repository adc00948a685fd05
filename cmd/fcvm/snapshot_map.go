//go:build linux

package main

import (
	"errors"
	"io/fs"

	"github.com/spf13/cobra"

	"fcvm/internal/memmap"
	"fcvm/internal/pagesum"
	"fcvm/internal/snapshot"
)

const snapshotMapLong = `Show which pages of a snapshot's memory hold data and which are zeros, and how many
are in its working set. -o writes a picture with a square for each page, and these
counts as its legend; docs/maps.md tells how to read it.`

func newSnapshotMap(a *app) *cobra.Command {
	var o mapOptions
	cmd := &cobra.Command{
		Use:               "map SNAPSHOT [flags]",
		Short:             "Draw a snapshot's memory as a picture: zero, data, working set",
		Long:              snapshotMapLong,
		Args:              exactly(1, "snapshot"),
		ValidArgsFunction: a.completeSnapshots,
		RunE:              func(_ *cobra.Command, args []string) error { return a.snapshotMap(args[0], o) },
	}
	o.flags(cmd)
	return cmd
}

func (a *app) snapshotMap(name string, o mapOptions) error {
	if err := a.checkMap(o); err != nil {
		return err
	}
	store, err := a.snapshots()
	if err != nil {
		return err
	}
	s, err := store.Get(name)
	if err != nil {
		return err
	}
	m, err := a.mapOf(s)
	if err != nil {
		return err
	}
	return a.showMap("", name, m, o)
}

// mapOf reads no memory: the sum of a page of zeros is 0.
func (a *app) mapOf(s *snapshot.Snapshot) (*memmap.Map, error) {
	sums, err := s.ReadPageSums()
	if err != nil {
		return nil, err
	}
	m := &memmap.Map{
		Title: "snapshot " + s.Name, PageBytes: pagesum.PageSize, States: memmap.SnapshotStates(), Pages: make([]memmap.Page, sums.Pages()),
	}
	for i := range m.Pages {
		m.Pages[i] = memmap.Data
		if sums.Sum(int64(i)) == 0 {
			m.Pages[i] = memmap.Zero
		}
	}
	set, err := s.ReadWorkingSet()
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		a.ui.Warn(err.Error())
	default:
		m.WorkingSet = true
		for p := range set.All() {
			m.Pages[p] |= memmap.InWorkingSet
		}
	}
	return m, nil
}
