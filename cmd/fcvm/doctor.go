//go:build linux

package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"fcvm/internal/doctor"
	"fcvm/internal/ui"
)

const doctorLong = `Look at what this machine can do: engines, whether KVM is really usable,
userfaultfd, page merging, the kernel, memory and disk. Where more is possible,
the lines to type are shown. Nothing is changed.

It exits with 5 when VMs cannot run here.`

func newDoctor(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [flags]",
		Short: "Show what this machine can do, and how to make it do more",
		Long:  doctorLong,
		Args:  exactly(0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.doctor(cmd.Context(), asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) doctor(ctx context.Context, asJSON bool) error {
	l, err := a.layout()
	if err != nil {
		return err
	}
	p := a.ui.Progress()
	defer p.Done()
	p.Set("checking this machine", 0, 0)
	report := doctor.Run(ctx, l)
	p.Done()
	if err := ctx.Err(); err != nil {
		return err
	}
	if asJSON {
		err = a.ui.JSON(report)
	} else {
		_, err = a.ui.Out.Write([]byte(doctorText(report)))
	}
	if err == nil && report.Failed() {
		return exitStatus(exitUnavailable)
	}
	return err
}

func doctorText(r doctor.Report) string {
	width := 0
	for _, c := range r.Checks {
		width = max(width, len(c.Name))
	}
	var b strings.Builder
	for _, c := range r.Checks {
		mark := string(c.Status)
		b.WriteString(mark + strings.Repeat(" ", 6-len(mark)))
		b.WriteString(c.Name + strings.Repeat(" ", width-len(c.Name)+2))
		b.WriteString(ui.Clean(c.Detail) + "\n")
		for _, line := range c.Fix {
			b.WriteString(strings.Repeat(" ", width+8) + ui.Clean(line) + "\n")
		}
	}
	return b.String()
}
