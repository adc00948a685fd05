//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/memmap"
)

const mapLong = `Show what a VM has of each page of its guest memory, as the kernel tells it in
/proc/PID/pagemap:

    shared     mapped from the template (or the memory file), where all clones of
               the snapshot can map it
    private    the VM's own: written by it, or copied for it
    zero       the kernel's zero page
    untouched  not mapped: the guest has not asked for it, or has given it back

and how many of these are in the working set of its snapshot. -o writes a picture
with a square for each page, and these counts as its legend; docs/maps.md tells
how to read it. The VM runs on meanwhile.`

func newMap(a *app) *cobra.Command {
	var o mapOptions
	cmd := &cobra.Command{
		Use:               "map VM [flags]",
		Short:             "Draw a VM's memory as a picture: untouched, zero, shared, private",
		Long:              mapLong,
		Args:              exactly(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.mapVM(cmd.Context(), args[0], o) },
	}
	o.flags(cmd)
	return cmd
}

func (a *app) mapVM(ctx context.Context, name string, o mapOptions) error {
	if err := a.checkMap(o); err != nil {
		return err
	}
	return a.withClient(ctx, func(c *api.Client) error {
		mm, err := c.MemoryMap(ctx, name)
		if err != nil {
			return err
		}
		if mm.Warning != "" {
			a.ui.Warn(mm.Warning)
		}
		title := "VM " + mm.VM
		if mm.Snapshot != "" {
			title += ", clone of " + mm.Snapshot
		}
		return a.showMap(mm.VM, mm.Snapshot, &memmap.Map{
			Title: title, PageBytes: mm.PageBytes, States: memmap.VMStates(), WorkingSet: mm.WorkingSet, Pages: mm.Pages,
		}, o)
	})
}
