//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/image"
)

func newImagePull(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "pull [flags] IMAGE...",
		Short: "Pull images from their registries",
		Long: `Pull images, and print their IDs. What the store has already is not downloaded
again. Credentials are those of docker and podman; registries on localhost may
speak plain HTTP.`,
		Args: atLeast(1, "image"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.imagePull(cmd.Context(), args, asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) imagePull(ctx context.Context, refs []string, asJSON bool) error {
	l, err := a.layout()
	if err != nil {
		return err
	}
	list := imageList{Version: api.SchemaVersion, Images: []imageSummary{}}
	err = each(refs, func(ref string) error {
		img, err := a.pull(ctx, l, ref, image.PullAlways)
		if err != nil {
			return err
		}
		if asJSON {
			list.Images = append(list.Images, summarizeImage(img))
			return nil
		}
		return a.ui.Println(img.ID)
	})
	if asJSON && len(list.Images) > 0 {
		if jerr := a.ui.JSON(list); jerr != nil {
			return jerr
		}
	}
	return err
}
