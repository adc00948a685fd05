//go:build linux

package main

import (
	"context"
	"strconv"

	"github.com/moby/sys/signal"
	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

func newKill(a *app) *cobra.Command {
	var sig string
	cmd := &cobra.Command{
		Use:               "kill [flags] VM...",
		Short:             "Send a signal to the process of VMs",
		Args:              atLeast(1, "VM"),
		ValidArgsFunction: a.completeVMs,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.kill(cmd.Context(), sig, args) },
	}
	cmd.Flags().StringVarP(&sig, "signal", "s", "KILL", "`signal` to send, by name or number")
	return cmd
}

func (a *app) kill(ctx context.Context, sig string, names []string) error {
	n, err := signal.ParseSignal(sig)
	if err != nil {
		return invalid("bad signal %q: want a name or a number, as in -s HUP", sig)
	}
	name := signalName(n)
	if name == "" { // a real-time signal
		name = strconv.Itoa(int(n))
	}
	return a.eachVM(ctx, names, func(c *api.Client, vm string) error { return c.Kill(ctx, vm, name) })
}
