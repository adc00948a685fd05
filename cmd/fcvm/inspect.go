//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

// vmDetails is the schema of inspect.
type vmDetails struct {
	Version int `json:"version"`
	api.VM
	// Stats is what the VM holds, and what its page server did for it; missing when
	// it does not run.
	Stats *api.VMStats `json:"stats,omitempty"`
}

func newInspect(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:               "inspect VM...",
		Short:             "Show all about VMs, as JSON",
		Long:              "Show all about VMs, as JSON: one object a VM, one after another.",
		Args:              atLeast(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.inspect(cmd.Context(), args) },
	}
	cmd.Flags().Bool("json", true, "print JSON, which inspect always does")
	return cmd
}

func (a *app) inspect(ctx context.Context, names []string) error {
	return a.withClient(ctx, func(c *api.Client) error {
		return each(names, func(name string) error {
			vm, err := c.Get(ctx, name)
			if err != nil {
				return err
			}
			var stats *api.VMStats
			if vm.State != api.StateExited {
				if stats, err = c.VMStats(ctx, vm.ID); err != nil {
					return err
				}
			}
			return a.ui.JSON(vmDetails{api.SchemaVersion, vm, stats})
		})
	})
}
