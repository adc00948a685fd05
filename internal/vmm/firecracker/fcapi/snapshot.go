package fcapi

import (
	"context"
	"fmt"
	"net/http"
)

// State is what a VM is told to be.
type State string

// The states.
const (
	Paused  State = "Paused"
	Resumed State = "Resumed"
)

// SetState pauses or resumes the VM.
func (c *Client) SetState(ctx context.Context, s State) error {
	return c.do(ctx, http.MethodPatch, "/vm", struct {
		State State `json:"state"`
	}{s}, nil)
}

// SnapshotType is how much memory a snapshot holds.
type SnapshotType string

// The types. A Full one faults in all memory of a VM that was itself loaded. A
// Diff one holds what was written since the last snapshot or load, which is known
// where TrackDirtyPages was asked for; the rest of its file is holes.
const (
	Full SnapshotType = "Full"
	Diff SnapshotType = "Diff"
)

// SnapshotCreate says where a snapshot goes. Both files are made, or overwritten.
type SnapshotCreate struct {
	Type SnapshotType `json:"snapshot_type"`
	// StateFile gets the device state.
	StateFile string `json:"snapshot_path"`
	// MemoryFile gets the guest's memory: its regions, one behind the other.
	MemoryFile string `json:"mem_file_path"`
}

// CreateSnapshot is of a paused VM, which stays paused.
func (c *Client) CreateSnapshot(ctx context.Context, s SnapshotCreate) error {
	return c.put(ctx, "/snapshot/create", s, nil)
}

// BackendType is how a loaded VM gets its memory.
type BackendType string

// The backends: a private mapping of a file, or anonymous memory with a userfaultfd that
// Firecracker sends to whoever listens on a socket.
const (
	File BackendType = "File"
	UFFD BackendType = "Uffd"
)

// MemoryBackend is where a loaded VM's memory comes from.
type MemoryBackend struct {
	Type BackendType `json:"backend_type"`
	// Path of the memory file, or of the page server's socket.
	Path string `json:"backend_path"`
}

// NetworkOverride gives an interface another TAP than the golden VM's.
type NetworkOverride struct {
	ID         string `json:"iface_id"`
	HostDevice string `json:"host_dev_name"`
}

// SnapshotLoad says what is loaded, and how.
type SnapshotLoad struct {
	StateFile string
	Memory    MemoryBackend
	// TrackDirtyPages makes diff snapshots of what was loaded possible.
	TrackDirtyPages bool
	// Resume lets the VM run as soon as it is loaded.
	Resume bool
	// Network needs [NetworkOverrides], if there is any.
	Network []NetworkOverride
	// VsockSocket replaces [Vsock.Socket], unless it is empty ([VsockOverride]).
	VsockSocket string
	// ClockRealtime needs [ClockRealtime].
	ClockRealtime bool
}

// loadBody is a [SnapshotLoad] as Firecracker wants it.
type loadBody struct {
	StateFile string            `json:"snapshot_path"`
	Memory    MemoryBackend     `json:"mem_backend"`
	Diff      bool              `json:"enable_diff_snapshots,omitempty"`
	Track     bool              `json:"track_dirty_pages,omitempty"`
	Resume    bool              `json:"resume_vm,omitempty"`
	Network   []NetworkOverride `json:"network_overrides,omitempty"`
	Vsock     *vsockOverride    `json:"vsock_override,omitempty"`
	Clock     bool              `json:"clock_realtime,omitempty"`
}

type vsockOverride struct {
	Socket string `json:"uds_path"`
}

// LoadSnapshot loads a snapshot into a Firecracker that was told nothing but
// where to log to. If it fails, Firecracker ends; an [*Error] holds what it said,
// unless it ended before it could say it ([ErrClosed]): then its log has it.
func (c *Client) LoadSnapshot(ctx context.Context, s SnapshotLoad) error {
	b := loadBody{
		StateFile: s.StateFile,
		Memory:    s.Memory,
		Resume:    s.Resume,
		Network:   s.Network,
		Clock:     s.ClockRealtime,
	}
	if c.Has(DirtyPagesOnLoad) {
		b.Track = s.TrackDirtyPages
	} else {
		b.Diff = s.TrackDirtyPages
	}
	if s.VsockSocket != "" {
		b.Vsock = &vsockOverride{s.VsockSocket}
	}
	err := c.version.need(map[Feature]bool{
		NetworkOverrides: len(s.Network) > 0,
		VsockOverride:    s.VsockSocket != "",
		ClockRealtime:    s.ClockRealtime,
	})
	if err != nil {
		return fmt.Errorf("load snapshot: %w", err)
	}
	return c.do(ctx, http.MethodPut, "/snapshot/load", b, nil)
}
