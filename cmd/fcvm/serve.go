//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/buildinfo"
	"fcvm/internal/supervisor"
)

const serveLong = `Run the supervisor of the data directory in the foreground, as a service manager
wants it. Commands start one themselves where none runs, which goes away some time
after its last VM.

Metrics for Prometheus are at /metrics of its socket, and ` + "`fcvm metrics`" + ` prints them;
with --metrics they are also where a Prometheus server can reach them. Whoever may
connect to that address may read them, names of VMs and snapshots among them.

While a snapshot has clones, the supervisor keeps a spare: a VMM that has loaded the
snapshot and waits, paused. The next clone takes it and is ready in half the time. It
ends with the snapshot's last clone, and ` + "`fcvm stats`" + ` counts what it holds.

SIGTERM and SIGINT end the supervisor; VMs run on, and the next one finds them.`

const (
	envSpares     = "FCVM_SPARES"
	defaultSpares = "1"
)

func newServe(a *app) *cobra.Command {
	var onDemand, stop bool
	var metrics, spares string
	cmd := &cobra.Command{
		Use:   "serve [flags]",
		Short: "Run the supervisor",
		Long:  serveLong,
		Args:  exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if stop {
				return a.serveStop(cmd.Context())
			}
			n, err := parseSpares(cmp.Or(spares, os.Getenv(envSpares), defaultSpares))
			if err != nil {
				return err
			}
			return a.serve(cmd.Context(), onDemand, metrics, n)
		},
	}
	cmd.Flags().StringVar(&spares, "spares", "",
		"keep `N` VMMs started ahead for the next clones of each snapshot that has clones (default: $FCVM_SPARES, or 1; 0 for none)")
	cmd.Flags().BoolVar(&onDemand, "on-demand", false, "exit when there is no VM and no client")
	_ = cmd.Flags().MarkHidden("on-demand")
	cmd.Flags().StringVar(&metrics, "metrics", "", "serve metrics at http://`ADDRESS`/metrics, too; on the loopback only, such as 127.0.0.1:9464")
	cmd.Flags().BoolVar(&stop, "stop", false, "end the supervisor that runs; its VMs run on")
	return cmd
}

func (a *app) serve(ctx context.Context, onDemand bool, metrics string, spares int) error {
	l, err := a.layout()
	if err != nil {
		return err
	}
	return supervisor.Run(ctx, supervisor.Options{
		Layout: l, Version: buildinfo.Get(), OnDemand: onDemand, Metrics: metrics, Spares: spares,
		Log: slog.New(slog.NewTextHandler(a.ui.Err, nil)),
	})
}

// serveStop ends the supervisor and returns when it is gone. None at all is no
// error.
func (a *app) serveStop(ctx context.Context) error {
	l, err := a.layout()
	if err != nil {
		return err
	}
	c, err := api.Dial(ctx, l, api.DialOptions{})
	if errors.Is(err, api.ErrNoSupervisor) {
		return nil
	}
	if err != nil {
		return err
	}
	pid := c.Server().PID
	_ = c.Close()
	// A pidfd: it can't be another process that gets the signal or is waited for.
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop supervisor %d: %w", pid, err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer pidfd.Close()
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop supervisor %d: %w", pid, err)
	}
	in, err := newInterruptible(pidfd)
	if err != nil {
		return err
	}
	defer in.close()
	stop := context.AfterFunc(ctx, in.interrupt)
	defer func() {
		if stop() {
			in.interrupt()
		}
	}()
	if err := in.wait(); ctx.Err() == nil {
		return err
	}
	return ctx.Err()
}
