// Package buildinfo knows which version of fcvm a binary is.
package buildinfo

import "runtime/debug"

// Version is set by the linker (-X fcvm/internal/buildinfo.Version=v1.2.3). It is
// empty in a binary that `go build` or `go install` made; use [Get].
var Version string

// Get returns the version that the linker set, else the one that the go command
// recorded (a tag, or a commit and its time), else "devel". The three binaries of
// one build have the same one.
func Get() string {
	if Version != "" {
		return Version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "devel"
	}
	return info.Main.Version
}
