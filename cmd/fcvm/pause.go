//go:build linux

package main

import (
	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

func newPause(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "pause VM...",
		Short:             "Stop the CPUs of VMs",
		Args:              atLeast(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachVM(cmd.Context(), args, func(c *api.Client, name string) error { return c.Pause(cmd.Context(), name) })
		},
	}
}
