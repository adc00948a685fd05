//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"
)

func newImageRm(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rm IMAGE...",
		Short: "Remove images, by name or ID",
		Long:  "Remove names of images, and an image with its last name. An image that a VM or a\nsnapshot uses stays.",
		Args:  atLeast(1, "image"),
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.completeImages(cmd, nil, part)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.imageRm(cmd.Context(), args) },
	}
}

func (a *app) imageRm(ctx context.Context, names []string) error {
	store, err := a.images()
	if err != nil {
		return err
	}
	return each(names, func(name string) error {
		gone, err := store.Remove(ctx, name)
		if err != nil {
			return err
		}
		for _, ref := range gone.Untagged {
			if err := a.ui.Println("untagged " + ref); err != nil {
				return err
			}
		}
		if gone.Deleted != "" {
			return a.ui.Println("deleted " + gone.Deleted)
		}
		return nil
	})
}
