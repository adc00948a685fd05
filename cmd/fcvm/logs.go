//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
)

type logsOptions struct {
	follow, timestamps bool
	tail, since        string
}

func newLogs(a *app) *cobra.Command {
	var o logsOptions
	cmd := &cobra.Command{
		Use:               "logs [flags] VM",
		Short:             "Show what a VM's process printed",
		Long:              "Show what a VM's process printed: its standard output on standard output, its\nstandard error on standard error.",
		Args:              exactly(1, "VM"),
		ValidArgsFunction: a.completeFirstVM,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.logs(cmd.Context(), o, args[0]) },
	}
	f := cmd.Flags()
	f.BoolVarP(&o.follow, "follow", "f", false, "go on until the process has ended")
	f.StringVarP(&o.tail, "tail", "n", "all", "show the last `lines` only")
	f.StringVar(&o.since, "since", "", "show what is not older than `time`: 10m, or 2026-01-02T15:04:05")
	f.BoolVarP(&o.timestamps, "timestamps", "t", false, "begin each line with its time")
	return cmd
}

func (a *app) logs(ctx context.Context, o logsOptions, vm string) error {
	since, err := parseSince(o.since, time.Now())
	if err != nil {
		return err
	}
	tail, err := parseTail(o.tail)
	if err != nil {
		return err
	}
	return a.withClient(ctx, func(c *api.Client) error {
		logs, err := c.Logs(ctx, vm, api.LogsRequest{Follow: o.follow, Tail: tail, Since: since})
		if err != nil {
			return err
		}
		defer logs.Close()
		if o.timestamps {
			err = copyStamped(logs, a.ui.Out, a.ui.Err)
		} else {
			seen := 0
			_, err = copyLog(logs, a.ui.Out, a.ui.Err, &seen)
		}
		if sig, ok := a.intr.signal().(syscall.Signal); ok && o.follow {
			// Ctrl-C is how following ends, and no error.
			return exitStatus(128 + int(sig))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	})
}

// stampLayout is RFC 3339 with all nine digits, so that lines align.
const stampLayout = "2006-01-02T15:04:05.000000000Z07:00"

// copyStamped is copyLog with the time before each line. A line gets the time of
// its first byte.
func copyStamped(r io.Reader, out, errs io.Writer) error {
	begun := map[proto.Stream]bool{} // streams that are inside a line
	for lr := proto.NewLogReader(r); ; {
		rec, err := lr.Next()
		if errors.Is(err, io.EOF) || (err == nil && rec.Stream == proto.Exit) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		w := out
		if rec.Stream == proto.Stderr {
			w = errs
		}
		var b []byte
		for line := range bytes.Lines(rec.Data) {
			if !begun[rec.Stream] {
				b = rec.Time.UTC().AppendFormat(b, stampLayout)
				b = append(b, ' ')
			}
			b = append(b, line...)
			begun[rec.Stream] = !bytes.HasSuffix(line, []byte("\n"))
		}
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
}
