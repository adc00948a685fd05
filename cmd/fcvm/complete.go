//go:build linux

package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/image"
	"fcvm/internal/snapshot"
)

// completeTimeout bounds what pressing TAB may take.
const completeTimeout = 2 * time.Second

// completeVMs completes the names of VMs. It starts no supervisor: where none
// runs, there is little to complete.
func (a *app) completeVMs(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	l, err := a.layout()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
	defer cancel()
	c, err := api.Dial(ctx, l, api.DialOptions{})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer func() { _ = c.Close() }()
	vms, err := c.List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	given := map[string]bool{}
	for _, name := range args {
		given[name] = true
	}
	var names []cobra.Completion
	for _, vm := range vms {
		if !given[vm.Name] {
			names = append(names, cobra.CompletionWithDesc(vm.Name, vm.Image))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeFirstVM completes a VM as the first argument only.
func (a *app) completeFirstVM(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.completeVMs(cmd, args, part)
}

func (a *app) completeSnapshots(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	l, err := a.layout()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	s, err := snapshot.Open(l.Snapshots())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, err := s.Names()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeImages(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	l, err := a.layout()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	s, err := image.Open(l.Images())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	list, err := s.List()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, img := range list {
		names = append(names, img.Refs...)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
