//go:build linux

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/image"
	"fcvm/internal/ui"
)

func newImage(a *app) *cobra.Command {
	return newGroup("image", "Manage images",
		newImagePull(a), newImageLoad(a), newImageLs(a), newImageRm(a))
}

func (a *app) images() (*image.Store, error) {
	l, err := a.layout()
	if err != nil {
		return nil, err
	}
	return image.Open(l.Images())
}

// imageSummary describes an image in JSON.
type imageSummary struct {
	ID      string    `json:"id"`
	Refs    []string  `json:"refs"`
	Size    int64     `json:"size_bytes"`
	Created time.Time `json:"created"`
	Pulled  time.Time `json:"pulled"`
	RootFS  string    `json:"rootfs"`
}

// imageList is the schema of --json of image ls, pull and load.
type imageList struct {
	Version int            `json:"version"`
	Images  []imageSummary `json:"images"`
}

func summarizeImage(img *image.Image) imageSummary {
	s := imageSummary{ID: img.ID, Refs: img.Refs, Size: img.Size, Created: img.Created, Pulled: img.Pulled, RootFS: img.RootFS}
	if s.Refs == nil {
		s.Refs = []string{}
	}
	return s
}

// imageName is what an image is called in a message: its name, or its ID.
func imageName(img *image.Image) string {
	if len(img.Refs) > 0 {
		return img.Refs[0]
	}
	return shortID(img.ID)
}

// shortID shortens a digest as docker does.
func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(12, len(id))]
}

// pullProgress shows what a pull does. Of downloads, which run side by side, it
// shows the sum.
func pullProgress(p *ui.Progress, ref string) func(image.Progress) {
	done, total := map[string]int64{}, map[string]int64{}
	return func(pr image.Progress) {
		switch pr.Stage {
		case image.StageResolve:
			p.Set("asking for "+ref, 0, 0)
		case image.StageWait:
			p.Set("waiting for another pull of "+ref, 0, 0)
		case image.StageDownload, image.StageMerge:
			key := string(pr.Stage) + pr.Layer
			done[key], total[key] = pr.Done, pr.Total
			var d, t int64
			layers := 0
			for k := range done {
				if strings.HasPrefix(k, string(pr.Stage)) {
					d, t, layers = d+done[k], t+total[k], layers+1
				}
			}
			verb := "pulling"
			if pr.Stage == image.StageMerge {
				verb = "unpacking"
			}
			p.Set(fmt.Sprintf("%s %s: %s,", verb, ref, plural(layers, "layer")), d, t)
		case image.StageSync:
			p.Set("writing "+ref, pr.Done, pr.Total)
		case image.StageDone:
		}
	}
}
