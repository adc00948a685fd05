//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

func newStop(a *app) *cobra.Command {
	var timeout string
	cmd := &cobra.Command{
		Use:   "stop [flags] VM...",
		Short: "Stop VMs",
		Long: `Send the image's stop signal (SIGTERM, unless the image names another) to the
process of each VM, and kill the VM when it has not ended in time.`,
		Args:              atLeast(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.stop(cmd.Context(), timeout, args) },
	}
	cmd.Flags().StringVarP(&timeout, "time", "t", "10", "`seconds` to wait before killing")
	return cmd
}

func (a *app) stop(ctx context.Context, timeout string, names []string) error {
	d, err := parseSeconds(timeout)
	if err != nil {
		return err
	}
	return a.eachVM(ctx, names, func(c *api.Client, name string) error { return c.Stop(ctx, name, d) })
}

// eachVM does something with each VM, and prints the names of those where it
// succeeded.
func (a *app) eachVM(ctx context.Context, names []string, f func(c *api.Client, name string) error) error {
	return a.withClient(ctx, func(c *api.Client) error {
		return each(names, func(name string) error {
			if err := f(c, name); err != nil {
				return err
			}
			return a.ui.Println(name)
		})
	})
}
