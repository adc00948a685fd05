//go:build linux

package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

func newWait(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "wait VM...",
		Short:             "Wait until VMs have exited, and print their exit codes",
		Args:              atLeast(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.wait(cmd.Context(), args) },
	}
}

func (a *app) wait(ctx context.Context, names []string) error {
	return a.withClient(ctx, func(c *api.Client) error {
		return each(names, func(name string) error {
			vm, err := c.Wait(ctx, name)
			if err != nil {
				return err
			}
			if vm.Error != "" {
				return &api.Error{Code: api.CodeInternal, Message: fmt.Sprintf("VM %s ended: %s", vm.Name, vm.Error)}
			}
			return a.ui.Println(strconv.Itoa(vm.ExitCode))
		})
	})
}
