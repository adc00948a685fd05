// Package api is the protocol between fcvm and its supervisor: HTTP and JSON
// over a unix socket whose peer must be the supervisor's own user or root.
//
// Bodies of exec and attach are, after "101 Switching Protocols", frames of
// internal/guest/proto in both directions: the supervisor passes them between
// the CLI and the guest's agent unchanged.
package api

import (
	"time"

	"fcvm/internal/memmap"
	"fcvm/internal/vmm"
)

// SchemaVersion is the "version" field of everything that is printed with
// --json. It grows when a field changes its meaning or goes away.
const SchemaVersion = 1

// State of a VM.
type State string

// The states of a VM.
const (
	StateCreating State = "creating" // the VMM starts, or the guest boots
	StateRunning  State = "running"
	StatePaused   State = "paused"
	StateExited   State = "exited" // the VM ended; ExitCode and Error say how
)

// VM describes one VM.
type VM struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Image is the reference it was started with, ImageDigest the manifest's digest.
	Image       string `json:"image"`
	ImageDigest string `json:"image_digest"`
	// Snapshot is the name of the snapshot that this VM is a clone of, or empty.
	Snapshot string `json:"snapshot,omitempty"`
	State    State  `json:"state"`
	// ExitCode of the container's process; valid when State is StateExited and
	// Error is empty.
	ExitCode int `json:"exit_code"`
	// Error says why a VM ended that should not have.
	Error string `json:"error,omitempty"`
	// PID of the VMM, 0 when it has ended.
	PID    int    `json:"pid"`
	Engine string `json:"engine"`
	// EngineVersion, Accel ("kvm", "tcg") and CPU are the engine's.
	EngineVersion string `json:"engine_version"`
	Accel         string `json:"accel"`
	CPU           string `json:"cpu"`

	CPUs        int   `json:"cpus"`
	MemoryBytes int64 `json:"memory_bytes"`
	// HugePages tells that the memory is of pages of 2 MiB.
	HugePages bool `json:"huge_pages,omitempty"`
	// MemBackend is "uffd" or "file", Policy "share" or "copy"; empty for a VM
	// that is not a clone.
	MemBackend string `json:"mem_backend,omitempty"`
	Policy     string `json:"policy,omitempty"`
	// Merge is of a clone that was started with --merge.
	Merge bool `json:"merge,omitempty"`
	// Jailed tells that the VMM is locked up.
	Jailed bool `json:"jailed,omitempty"`
	// NoReplay is of a clone that was started with --no-replay.
	NoReplay bool `json:"no_replay,omitempty"`
	// Network is "user", "tap" or "none"; empty for clones of snapshots that are older.
	Network    vmm.Network `json:"network,omitempty"`
	Ports      []vmm.Port  `json:"ports"`
	Hostname   string      `json:"hostname"`
	Command    []string    `json:"command"`
	Env        []string    `json:"env,omitempty"`
	TTY        bool        `json:"tty"`
	OpenStdin  bool        `json:"open_stdin"`
	AutoRemove bool        `json:"auto_remove"`

	Created  time.Time  `json:"created"`
	Started  *time.Time `json:"started,omitempty"`
	Finished *time.Time `json:"finished,omitempty"`
	// ReadyMillis is the time from the request until the VM was ready.
	ReadyMillis float64 `json:"ready_ms"`
	// Warnings that a person should see, such as a fallback from share to file.
	Warnings []string `json:"warnings,omitempty"`
}

// RunRequest starts a VM from an image that is already in the image store.
type RunRequest struct {
	// Name is empty for a generated one.
	Name string `json:"name,omitempty"`
	// Image is the reference as the user wrote it, ImageID the store's.
	Image   string `json:"image"`
	ImageID string `json:"image_id"`

	// Entrypoint replaces the image's when not nil (an empty one removes it);
	// Command replaces the image's when not empty. As docker.
	Entrypoint []string `json:"entrypoint,omitempty"`
	// ClearEntrypoint is set by --entrypoint "".
	ClearEntrypoint bool     `json:"clear_entrypoint,omitempty"`
	Command         []string `json:"command,omitempty"`
	Env             []string `json:"env,omitempty"`
	WorkDir         string   `json:"workdir,omitempty"`
	User            string   `json:"user,omitempty"`
	Hostname        string   `json:"hostname,omitempty"`
	TTY             bool     `json:"tty,omitempty"`
	OpenStdin       bool     `json:"open_stdin,omitempty"`

	Engine string `json:"engine,omitempty"`
	// Jail locks the VMM up; without an Engine, that is Firecracker.
	Jail        bool    `json:"jail,omitempty"`
	MemoryBytes int64   `json:"memory_bytes"`
	CPUs        float64 `json:"cpus"`
	// HugePages makes the memory of pages of 2 MiB, as that of its clones; without an
	// Engine, that is Firecracker.
	HugePages bool `json:"huge_pages,omitempty"`
	// Network of the VM, which its clones have, too; empty means the engine's default.
	Network vmm.Network `json:"network,omitempty"`
	// Ports with HostPort 0 get a free one.
	Ports      []vmm.Port `json:"ports,omitempty"`
	AutoRemove bool       `json:"auto_remove,omitempty"`
	// BootTimeout in seconds, 0 for the default.
	BootTimeout float64 `json:"boot_timeout,omitempty"`
	// Kernel replaces the guest kernel (a path on the host), or is empty.
	Kernel string `json:"kernel,omitempty"`
}

// CloneRequest starts clones of a snapshot.
type CloneRequest struct {
	Snapshot string `json:"snapshot"`
	// Name of the clone; with Count over 1 the clones are Name-1 … Name-Count.
	// Empty for generated names.
	Name  string `json:"name,omitempty"`
	Count int    `json:"count"`
	// Ports of the first clone; each further one listens one port higher.
	Ports []vmm.Port `json:"ports,omitempty"`
	// Env is given to processes that exec starts in the clone.
	Env        []string `json:"env,omitempty"`
	MemBackend string   `json:"mem_backend,omitempty"`
	Policy     string   `json:"policy,omitempty"`
	// Merge has the kernel merge pages that clones hold alike (KSM). For policy copy.
	Merge bool `json:"merge,omitempty"`
	// NoReplay has the snapshot's working set neither replayed nor recorded.
	NoReplay bool `json:"no_replay,omitempty"`
	// Jail locks the VMM up.
	Jail       bool `json:"jail,omitempty"`
	AutoRemove bool `json:"auto_remove,omitempty"`
}

// SnapshotRequest makes a snapshot of a VM.
type SnapshotRequest struct {
	VM   string `json:"vm"`
	Name string `json:"name"`
}

// SnapshotResult says what was made, and for how long the VM was paused.
type SnapshotResult struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	// PauseMillis is the time from the pause of the vCPUs until they went on.
	PauseMillis float64 `json:"pause_ms"`
	TotalMillis float64 `json:"total_ms"`
	// PrivateBytes were written while the VM was paused.
	PrivateBytes int64 `json:"private_bytes"`
	// DiskBytes that the snapshot occupies.
	DiskBytes int64 `json:"disk_bytes"`
}

// ExecRequest starts a process in a VM.
type ExecRequest struct {
	Command []string `json:"command"`
	Env     []string `json:"env,omitempty"`
	WorkDir string   `json:"workdir,omitempty"`
	User    string   `json:"user,omitempty"`
	TTY     bool     `json:"tty,omitempty"`
	Stdin   bool     `json:"stdin,omitempty"`
	Rows    uint16   `json:"rows,omitempty"`
	Cols    uint16   `json:"cols,omitempty"`
}

// LogsRequest selects what of a VM's log is sent.
type LogsRequest struct {
	Follow bool
	// Tail is the number of last lines, negative for all.
	Tail int
	// Since drops what is older, when not zero.
	Since time.Time
}

// VMStats is what one VM holds, from /proc/PID/smaps. Sizes are in bytes.
type VMStats struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	// RSSBytes, PSSBytes, PrivateBytes and SharedBytes of guest memory alone.
	RSSBytes     int64 `json:"rss_bytes"`
	PSSBytes     int64 `json:"pss_bytes"`
	PrivateBytes int64 `json:"private_bytes"`
	SharedBytes  int64 `json:"shared_bytes"`
	// AnonBytes are the pages that only this VM can ever use: written by it, or
	// copied for it.
	AnonBytes int64 `json:"anon_bytes"`
	// OverheadBytes is the PSS of all else in the VMM's process.
	OverheadBytes int64 `json:"overhead_bytes"`
	MemoryBytes   int64 `json:"memory_bytes"`
	// Faults that the page server answered.
	Faults   uint64 `json:"faults"`
	Snapshot string `json:"snapshot,omitempty"`
	// Policy of its page server, or empty; Serving is all that this did for it.
	Policy  string   `json:"policy,omitempty"`
	Serving *Serving `json:"serving,omitempty"`
	// Hint says where another choice would hold less, or is empty.
	Hint string `json:"hint,omitempty"`
}

// MemoryMap tells what a VM has of each page of its guest memory.
type MemoryMap struct {
	Version int `json:"version"`
	// VM is its name, Snapshot that of which it is a clone, or empty.
	VM       string `json:"vm"`
	Snapshot string `json:"snapshot,omitempty"`
	// PageBytes is the size of a page.
	PageBytes int64 `json:"page_bytes"`
	// Pages in the order of the guest's memory, as internal/memmap has them: a byte
	// each, all together in base64.
	Pages []memmap.Page `json:"pages"`
	// WorkingSet tells that the snapshot's working set is known, and so part of Pages.
	WorkingSet bool `json:"working_set"`
	// Warning says why the working set is unusable, or is empty.
	Warning string `json:"warning,omitempty"`
}

// Stats is the answer of the stats endpoint.
type Stats struct {
	Version int       `json:"version"`
	VMs     []VMStats `json:"vms"`
	// PageServers in use, one per snapshot and policy.
	PageServers []PageServerStats `json:"page_servers"`
	Total       TotalStats        `json:"total"`
}

// PageServerStats is what one page server holds. Sessions are those of clones.
type PageServerStats struct {
	Snapshot string `json:"snapshot"`
	Policy   string `json:"policy"`
	NoReplay bool   `json:"no_replay"`
	PID      int    `json:"pid"`
	// TemplateBytes resident in the template, RSSBytes of the process without it.
	TemplateBytes int64 `json:"template_bytes"`
	RSSBytes      int64 `json:"rss_bytes"`
	// ReplayedBytes of the template were filled from the working set,
	// BackgroundBytes by the background fill, and the rest because clones waited.
	ReplayedBytes   int64 `json:"replayed_bytes"`
	BackgroundBytes int64 `json:"background_bytes"`
	// WorkingSetPages are replayed for a new clone.
	WorkingSetPages int64 `json:"working_set_pages"`
	// Sessions are the VMs that it serves, EndedSessions those that it served
	// before; Failures of them were killed because a fault could not be answered.
	Sessions      int `json:"sessions"`
	EndedSessions int `json:"ended_sessions"`
	Failures      int `json:"failures"`
	// Refused connections became no session.
	Refused int `json:"refused"`
	// Faults that it answered, also those of VMs that have ended.
	Faults uint64 `json:"faults"`
	// Demand is the time from reading a fault to its answer, Replay and Background
	// that of placing some pages ahead.
	Demand     Latency   `json:"demand"`
	Replay     Latency   `json:"replay"`
	Background Latency   `json:"background"`
	Handovers  Handovers `json:"handovers"`
}

// TotalStats sums up guest memory over all VMs.
type TotalStats struct {
	// UnsharedBytes is what the same VMs would hold if nothing were shared.
	UnsharedBytes int64 `json:"unshared_bytes"`
	// HeldBytes is what they hold, each template counted once.
	HeldBytes int64 `json:"held_bytes"`
	// SavedPercent is 100 × (1 − held/unshared).
	SavedPercent float64 `json:"saved_percent"`
	// OverheadBytes of all VMMs and page servers.
	OverheadBytes int64 `json:"overhead_bytes"`
	// MemoryBytes is the sum of the guests' sizes.
	MemoryBytes int64 `json:"memory_bytes"`
	// Spares is the number of VMMs that were started ahead and wait for a clone,
	// SpareBytes what they hold; it is part of HeldBytes and OverheadBytes.
	Spares     int   `json:"spares"`
	SpareBytes int64 `json:"spare_bytes"`
}

// ServerInfo is the answer of the version endpoint.
type ServerInfo struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
	VMs     int    `json:"vms"`
}

// Code classifies an error for the CLI's exit code and for scripts.
type Code string

// The codes of errors.
const (
	CodeNotFound    Code = "not_found"
	CodeConflict    Code = "conflict"    // a name or port is taken, a snapshot is in use
	CodeInvalid     Code = "invalid"     // the request is wrong
	CodeUnavailable Code = "unavailable" // the host lacks something
	CodeState       Code = "state"       // the VM is not in a state that allows it
	CodeDamaged     Code = "damaged"     // a snapshot's files are not what was written
	CodeInternal    Code = "internal"
)

// Error is the body of every answer that is not a success.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	// Hint is what to do next, or empty.
	Hint string `json:"hint,omitempty"`
	// ExitCode that `run` and `exec` end with, as docker: 126 for a command that
	// cannot be executed, 127 for one that isn't there; 0 for the default.
	ExitCode int `json:"exit_code,omitempty"`
}

// Error implements error.
func (e *Error) Error() string { return e.Message }
