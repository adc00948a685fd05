//go:build linux

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

const metricsLong = `Print what the supervisor knows in Prometheus' text format: VMs and what they hold,
page servers, faults and how long their answers took. docs/metrics.md lists them.

A collector that reads HTTP from a unix socket finds the same there:
    curl --unix-socket "$(fcvm metrics --socket)" http://fcvm/metrics
and ` + "`fcvm serve --metrics ADDRESS`" + ` serves it by TCP.`

func newMetrics(a *app) *cobra.Command {
	var socket bool
	cmd := &cobra.Command{
		Use:   "metrics [flags]",
		Short: "Print metrics for Prometheus",
		Long:  metricsLong,
		Args:  exactly(0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.metrics(cmd.Context(), socket) },
	}
	cmd.Flags().BoolVar(&socket, "socket", false, "print the path of the supervisor's socket instead")
	return cmd
}

func (a *app) metrics(ctx context.Context, socket bool) error {
	if socket {
		l, err := a.layout()
		if err != nil {
			return err
		}
		return a.ui.Println(l.Socket())
	}
	return a.withClient(ctx, func(c *api.Client) error {
		b, err := c.Metrics(ctx)
		if err != nil {
			return err
		}
		if _, err := a.ui.Out.Write(b); err != nil {
			return fmt.Errorf("print metrics: %w", err)
		}
		return nil
	})
}
