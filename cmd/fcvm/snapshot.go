//go:build linux

package main

import (
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/snapshot"
)

func newSnapshot(a *app) *cobra.Command {
	return newGroup("snapshot", "Make and manage snapshots",
		newSnapshotCreate(a), newSnapshotLs(a), newSnapshotInspect(a), newSnapshotRm(a), newSnapshotVerify(a), newSnapshotMap(a))
}

func (a *app) snapshots() (*snapshot.Store, error) {
	l, err := a.layout()
	if err != nil {
		return nil, err
	}
	return snapshot.Open(l.Snapshots())
}

// snapshotSummary is what snapshot ls --json says of each.
type snapshotSummary struct {
	Name        string    `json:"name"`
	VM          string    `json:"vm,omitempty"`
	Image       string    `json:"image,omitempty"`
	ImageDigest string    `json:"image_digest,omitempty"`
	Parent      string    `json:"parent,omitempty"`
	Engine      string    `json:"engine,omitempty"`
	Created     time.Time `json:"created,omitzero"`
	MemoryBytes int64     `json:"memory_bytes,omitempty"`
	DiskBytes   int64     `json:"disk_bytes,omitempty"`
	// Error says why the snapshot can't be used.
	Error string `json:"error,omitempty"`
}

func summarize(l snapshot.Listed) snapshotSummary {
	s := snapshotSummary{Name: l.Name}
	if l.Err != nil {
		s.Error = l.Err.Error()
		return s
	}
	m := l.Snapshot
	s.VM, s.Image, s.ImageDigest, s.Parent = m.VM, m.Image.Ref, m.Image.ID, m.Parent
	s.Engine = m.Engine.Name + " " + m.Engine.Version
	s.Created, s.MemoryBytes, s.DiskBytes = m.Created, m.Machine.MemoryBytes, m.DiskBytes()
	return s
}
