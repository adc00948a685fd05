// Package image keeps container images as root file systems that VMs can share:
// one read-only EROFS file per image, made from the image's layers without root
// and without mounts, and stored once under the digest of the image's manifest.
//
// The store is a directory that any number of processes of one user may use at
// once. Everything is written aside, synced and renamed, so what has its final
// name is whole. Locks are flock(2): the kernel drops them when a process dies.
package image

import (
	"errors"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Sentinels on which callers decide; errors of this package wrap them.
var (
	// ErrUnknown means that the store has no such image, or the registry has no
	// such repository, tag or digest.
	ErrUnknown = errors.New("no such image")
	// ErrAmbiguous means that an ID prefix fits several images.
	ErrAmbiguous = errors.New("ambiguous image ID")
	// ErrInUse means that a VM or a snapshot holds a lease on the image.
	ErrInUse = errors.New("image is in use")
	// ErrReference means that a name is malformed.
	ErrReference = errors.New("malformed image name")
	// ErrNoPlatform means that the image does not exist for the wanted platform.
	ErrNoPlatform = errors.New("image has no such platform")
	// ErrUnauthorized means that the registry wants other credentials.
	ErrUnauthorized = errors.New("registry refuses access")
	// ErrRegistry means that the registry could not be reached, or broke off.
	ErrRegistry = errors.New("registry failed")
	// ErrCorrupt means that bytes do not match their digest, or that a layer
	// is not a well-formed archive.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrNoSpace means that the disk of the data directory is full.
	ErrNoSpace = errors.New("no space left")
	// ErrNoCommand means that neither the image nor the user names a command.
	ErrNoCommand = errors.New("image has no command")
)

// Image is an image in the store. It is a copy: it does not change when the
// store does.
type Image struct {
	// ID is the digest of the image's manifest, "sha256:" and 64 hex digits.
	ID string
	// Refs are the names that lead to the image, in the short form in which
	// people write them ("nginx:latest"), sorted. Empty for an untagged image.
	Refs []string
	// RootFS is the absolute path of the EROFS file.
	RootFS string
	// Config is the image's configuration: command, environment, user, …
	Config v1.ConfigFile
	// Size of the EROFS file in bytes. Its holes count, so that the disk may
	// hold less.
	Size int64
	// Created is when the image was built, by its own account.
	Created time.Time
	// Pulled is when it came into the store.
	Pulled time.Time
}

// Policy says when Pull asks the registry.
type Policy string

// The policies of docker's --pull.
const (
	PullMissing Policy = "missing" // only when the store has no image of that name; the default
	PullAlways  Policy = "always"  // ask, and download what changed
	PullNever   Policy = "never"
)

// DefaultPlatform is the only platform whose programs fcvm's guests can run.
const DefaultPlatform = "linux/amd64"

// PullOptions of Pull and Load. The zero value is usable.
type PullOptions struct {
	// Policy is "missing" when empty. Images on the local disk ("oci:…") are
	// read again every time unless it is "never"; it costs nothing when they
	// did not change.
	Policy Policy
	// Platform is DefaultPlatform when empty.
	Platform string
	// Progress, when not nil, is called with what happens. Calls never overlap,
	// and none comes after Pull returned. It must not block for long.
	Progress func(Progress)
}

// Stage of a pull.
type Stage string

// The stages, in their order. Downloads of one layer run beside the merge of
// another.
const (
	StageResolve  Stage = "resolve"  // asking for the manifest
	StageWait     Stage = "wait"     // another process pulls the same image
	StageDownload Stage = "download" // per layer; bytes as they are compressed
	StageMerge    Stage = "merge"    // per layer; bytes as they are compressed
	StageSync     Stage = "sync"     // writing the rest of the file system
	StageDone     Stage = "done"     // Total is the size of the file system
)

// Progress of a pull.
type Progress struct {
	Stage Stage
	// Layer is the digest of the layer, empty where the stage has none.
	Layer string
	// Done and Total are bytes; Total is 0 when it isn't known.
	Done, Total int64
}
