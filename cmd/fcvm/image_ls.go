//go:build linux

package main

import (
	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/image"
	"fcvm/internal/ui"
)

func newImageLs(a *app) *cobra.Command {
	var quiet, asJSON bool
	cmd := &cobra.Command{
		Use:   "ls [flags]",
		Short: "List images",
		Args:  exactly(0, ""),
		RunE:  func(*cobra.Command, []string) error { return a.imageLs(quiet, asJSON) },
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print names only (IDs, where there is no name)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) imageLs(quiet, asJSON bool) error {
	store, err := a.images()
	if err != nil {
		return err
	}
	imgs, err := store.List()
	if err != nil {
		return err
	}
	list := imageList{Version: api.SchemaVersion, Images: []imageSummary{}}
	var rows [][]string
	for _, img := range imgs {
		list.Images = append(list.Images, summarizeImage(img))
		for _, name := range imageNames(img) {
			rows = append(rows, []string{name, shortID(img.ID), ui.Size(img.Size), ui.Age(img.Created), ui.Age(img.Pulled)})
		}
	}
	switch {
	case asJSON:
		return a.ui.JSON(list)
	case quiet:
		for _, row := range rows {
			if err := a.ui.Println(row[0]); err != nil {
				return err
			}
		}
		return nil
	}
	return a.ui.Table([]string{"NAME", "ID", "SIZE", "CREATED", "PULLED"}, rows)
}

// imageNames are the names of an image, or its ID where it has none.
func imageNames(img *image.Image) []string {
	if len(img.Refs) == 0 {
		return []string{shortID(img.ID)}
	}
	return img.Refs
}
