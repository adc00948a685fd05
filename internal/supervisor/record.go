package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"fcvm/internal/api"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
)

// recordSchema is the version of state files. One of another version was
// written by another fcvm, and is left alone.
const recordSchema = 1

// maxRecord bounds a state file, in bytes. Its largest part is the environment.
const maxRecord = 8 << 20

// record is the state file of a VM: all that a later supervisor needs.
type record struct {
	Schema int    `json:"schema"`
	VM     api.VM `json:"vm"`
	// Handle is nil until the VMM runs.
	Handle    *vmm.Handle        `json:"handle,omitempty"`
	Machine   vmm.Machine        `json:"machine"`
	Guest     snapshot.Guest     `json:"guest"`
	Container snapshot.Container `json:"container"`
	// ClientEnv is given to what exec starts.
	ClientEnv []string `json:"client_env,omitempty"`
	// PageServer that serves this clone, or nil.
	PageServer *pageServerRecord `json:"page_server,omitempty"`
	// Killed is set before the supervisor itself ends the VM for good: without
	// an exit record from the guest, its exit code is then 137, as docker's.
	Killed bool `json:"killed,omitempty"`
	// KillReason is why, when nobody asked for it.
	KillReason string `json:"kill_reason,omitempty"`
}

// pageServerRecord is how a later supervisor finds a page server.
type pageServerRecord struct {
	Key    serverKey       `json:"key"`
	Handle json.RawMessage `json:"handle"`
}

const stateFile = "state.json"

func statePath(dir string) string { return filepath.Join(dir, stateFile) }

// save replaces the state file. It is not synced: a crash of the host ends the
// VM, too, and a rename is enough for one of the supervisor.
func (r *record) save(dir string) error {
	r.Schema = recordSchema
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode state of VM %s: %w", r.VM.Name, err)
	}
	tmp := statePath(dir) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write state of VM %s: %w", r.VM.Name, err)
	}
	if err := os.Rename(tmp, statePath(dir)); err != nil {
		return fmt.Errorf("write state of VM %s: %w", r.VM.Name, err)
	}
	return nil
}

func loadRecord(dir string) (*record, error) {
	fi, err := os.Stat(statePath(dir))
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if fi.Size() > maxRecord {
		return nil, fmt.Errorf("read state: %s has %d bytes, over the limit of %d", statePath(dir), fi.Size(), maxRecord)
	}
	b, err := os.ReadFile(statePath(dir))
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	r, err := parseRecord(b)
	if err != nil {
		return nil, fmt.Errorf("read state %s: %w", statePath(dir), err)
	}
	if r.VM.ID != filepath.Base(dir) {
		return nil, fmt.Errorf("read state %s: it is that of VM %s", statePath(dir), r.VM.ID)
	}
	return r, nil
}

// parseRecord refuses what no supervisor wrote, so that nobody kills a process
// or follows a path because of half a file.
func parseRecord(b []byte) (*record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, err
	}
	if r.Schema != recordSchema {
		return nil, fmt.Errorf("schema %d is not %d", r.Schema, recordSchema)
	}
	if !idPattern.MatchString(r.VM.ID) {
		return nil, fmt.Errorf("bad ID %q", r.VM.ID)
	}
	if err := checkName(r.VM.Name); err != nil {
		return nil, err
	}
	switch r.VM.State {
	case api.StateCreating, api.StateRunning, api.StatePaused, api.StateExited:
	default:
		return nil, fmt.Errorf("bad state %q", r.VM.State)
	}
	if r.Handle == nil {
		if r.VM.State == api.StateRunning || r.VM.State == api.StatePaused {
			return nil, errors.New("a VM that runs has no handle")
		}
		return &r, nil
	}
	if r.Handle.PID <= 1 {
		return nil, fmt.Errorf("bad pid %d", r.Handle.PID)
	}
	for _, g := range r.Handle.Regions {
		if g.Size <= 0 || g.Offset < 0 || g.Addr+uint64(g.Size) < g.Addr {
			return nil, errors.New("bad memory region")
		}
	}
	return &r, nil
}
