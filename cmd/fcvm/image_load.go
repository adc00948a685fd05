//go:build linux

package main

import (
	"context"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/image"
)

func newImageLoad(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "load [flags] PATH",
		Short: "Load images from a directory or an archive",
		Long: `Load images from oci:DIR[:TAG], oci-archive:FILE or docker-archive:FILE, and print
their names.`,
		Args: exactly(1, "path"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.imageLoad(cmd.Context(), args[0], asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) imageLoad(ctx context.Context, path string, asJSON bool) error {
	store, err := a.images()
	if err != nil {
		return err
	}
	p := a.ui.Progress()
	defer p.Done()
	imgs, err := store.Load(ctx, path, image.PullOptions{Progress: pullProgress(p, path)})
	p.Done()
	if err != nil {
		return err
	}
	list := imageList{Version: api.SchemaVersion, Images: []imageSummary{}}
	for _, img := range imgs {
		list.Images = append(list.Images, summarizeImage(img))
		if asJSON {
			continue
		}
		if err := a.ui.Println(imageName(img)); err != nil {
			return err
		}
	}
	if asJSON {
		return a.ui.JSON(list)
	}
	return nil
}
