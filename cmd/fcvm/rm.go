//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

func newRm(a *app) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rm [flags] VM...",
		Short:             "Remove VMs",
		Long:              "Remove VMs that have exited, with their logs and all that they wrote; with -f\nthose that run, too.",
		Args:              atLeast(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.rm(cmd.Context(), force, args) },
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill VMs that run; one that does not exist is no error")
	return cmd
}

func (a *app) rm(ctx context.Context, force bool, names []string) error {
	return a.eachVM(ctx, names, func(c *api.Client, name string) error {
		err := c.Remove(ctx, name, force)
		if force && isCode(err, api.CodeNotFound) {
			return nil
		}
		return err
	})
}
