//go:build linux

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/network"
	"fcvm/internal/ui"
	"fcvm/internal/vmm"
)

// vmList is the schema of ls --json and clone --json.
type vmList struct {
	Version int      `json:"version"`
	VMs     []api.VM `json:"vms"`
}

func newLs(a *app) *cobra.Command {
	var all, quiet, asJSON bool
	cmd := &cobra.Command{
		Use:     "ls [flags]",
		Aliases: []string{"ps"},
		Short:   "List VMs",
		Long:    "List the VMs that run or are paused; with -a those that have exited, too.",
		Args:    exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.ls(cmd.Context(), all, quiet, asJSON)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "show exited VMs, too")
	f.BoolVarP(&quiet, "quiet", "q", false, "print names only")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) ls(ctx context.Context, all, quiet, asJSON bool) error {
	return a.withClient(ctx, func(c *api.Client) error {
		list, err := c.List(ctx)
		if err != nil {
			return err
		}
		vms := make([]api.VM, 0, len(list))
		for _, vm := range list {
			if all || vm.State != api.StateExited {
				vms = append(vms, vm)
			}
		}
		switch {
		case asJSON:
			return a.ui.JSON(vmList{Version: api.SchemaVersion, VMs: vms})
		case quiet:
			for _, vm := range vms {
				if err := a.ui.Println(vm.Name); err != nil {
					return err
				}
			}
			return nil
		}
		rows := make([][]string, 0, len(vms))
		for _, vm := range vms {
			rows = append(rows, []string{
				vm.Name, vm.Image, vmStatus(vm), ui.Age(vm.Created), ui.Size(vm.MemoryBytes), vm.Snapshot, portList(vm.Ports),
			})
		}
		return a.ui.Table([]string{"NAME", "IMAGE", "STATUS", "CREATED", "MEMORY", "SNAPSHOT", "PORTS"}, rows)
	})
}

func vmStatus(vm api.VM) string {
	switch {
	case vm.State == api.StateExited && vm.Error != "":
		return "failed"
	case vm.State == api.StateExited:
		return fmt.Sprintf("exited (%d)", vm.ExitCode)
	}
	return string(vm.State)
}

func portList(ports []vmm.Port) string {
	var list []string
	for _, p := range ports {
		// The guest's side carries the protocol, as docker prints it.
		host := strings.TrimSuffix(network.HostAddr(p), "/"+p.Proto)
		list = append(list, fmt.Sprintf("%s->%d/%s", host, p.GuestPort, p.Proto))
	}
	return strings.Join(list, ", ")
}
