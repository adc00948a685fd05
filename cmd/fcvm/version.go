//go:build linux

package main

import (
	"runtime"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/buildinfo"
)

// versionInfo is the schema of version --json.
type versionInfo struct {
	Version int    `json:"version"`
	FCVM    string `json:"fcvm"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func newVersion(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of fcvm",
		Args:  exactly(0, ""),
		RunE: func(*cobra.Command, []string) error {
			if asJSON {
				return a.ui.JSON(versionInfo{api.SchemaVersion, buildinfo.Get(), runtime.Version(), runtime.GOOS, runtime.GOARCH})
			}
			return a.ui.Println("fcvm " + buildinfo.Get())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
