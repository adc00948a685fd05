package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"

	"fcvm/internal/pagesum"
	"fcvm/internal/vmm"
)

// SchemaVersion is the "schema" field of the manifests that this package writes
// and reads. 2 came with mem.sums: without it nobody can tell whether a single
// page is what was written, so that an older snapshot has to be made anew.
const SchemaVersion = 2

// maxManifest bounds a manifest, in bytes. Its largest part is the environment
// of the container, which execve limits to 6 MiB on Linux, and which is some
// kilobytes in practice.
const maxManifest = 1 << 20

// maxMemory bounds the guest memory that a manifest may claim: 1 TiB.
const maxMemory = 1 << 40

// The files of a snapshot.
const (
	manifestFile   = "manifest.json"
	memoryFile     = "mem.img"
	stateFile      = "state.bin"
	sumsFile       = "mem.sums"
	leaseFile      = "lease"
	stampFile      = "verified"
	workingSetFile = "workingset"
)

// ErrDamaged means that a snapshot's files are not what was written: truncated,
// edited or missing. It cannot be repaired.
var ErrDamaged = errors.New("snapshot is damaged")

// Manifest says what a snapshot holds, and what a clone of it needs.
type Manifest struct {
	// Schema is SchemaVersion. Create fills it in.
	Schema int `json:"schema"`
	// Name of the snapshot. Create fills it in.
	Name string `json:"name"`
	// Created is when the snapshot was begun. Create fills it in where it is zero.
	Created time.Time `json:"created"`
	// VM is the name of the VM that it was taken of.
	VM string `json:"vm"`
	// Parent is the snapshot that this VM was a clone of, or empty. It is a note:
	// a snapshot does not need its parent.
	Parent string `json:"parent,omitempty"`

	Image   Image       `json:"image"`
	Engine  Engine      `json:"engine"`
	Machine Machine     `json:"machine"`
	Guest   Guest       `json:"guest"`
	Regions []MemRegion `json:"regions"`

	Container Container `json:"container"`
	// Files are mem.img, state.bin and mem.sums. Create fills them in.
	Files []File `json:"files"`
	// Sum is the SHA-256 of the manifest with this field empty, in hexadecimal.
	// Create fills it in.
	Sum string `json:"sum"`
}

// Image is the image whose file system the VM uses, and which a clone needs.
type Image struct {
	// Ref is the reference as the user wrote it.
	Ref string `json:"ref"`
	// ID is the image store's: "sha256:…" of the image's manifest.
	ID string `json:"id"`
}

// Engine is the program that wrote the device state. Only the same engine and
// version can load it.
type Engine struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	// Accel is "kvm" or "tcg", CPU the model that the guest sees.
	Accel string `json:"accel"`
	CPU   string `json:"cpu"`
}

// Machine is the shape of the VM.
type Machine struct {
	MemoryBytes int64 `json:"memory_bytes"`
	CPUs        int   `json:"cpus"`
	// HugePages says that the VM's memory was of pages of 2 MiB, as its clones' has to be.
	HugePages bool `json:"huge_pages,omitempty"`
	// Network is a vmm.Network; empty in snapshots from before there was a choice.
	Network vmm.Network `json:"network,omitempty"`
}

// Guest names what the VM booted. It is running already in a clone, and so is
// never loaded again; the digests tell which agent speaks there.
type Guest struct {
	KernelVersion string `json:"kernel_version"`
	KernelDigest  string `json:"kernel_digest"`
	InitrdDigest  string `json:"initrd_digest"`
}

// MemRegion is a range of guest memory in mem.img.
type MemRegion struct {
	// Offset in mem.img, and Size, in bytes; both are multiples of 4096.
	Offset int64 `json:"offset"`
	Size   int64 `json:"size"`
}

// Container is what fcvm must know of the container's process in a clone.
type Container struct {
	// Command is the whole of it, entrypoint included.
	Command    []string `json:"command"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkDir    string   `json:"workdir,omitempty"`
	Hostname   string   `json:"hostname,omitempty"`
	StopSignal string   `json:"stop_signal,omitempty"`
	TTY        bool     `json:"tty,omitempty"`
	OpenStdin  bool     `json:"open_stdin,omitempty"`
	// Ports that the VM published. A clone publishes its own.
	Ports []vmm.Port `json:"ports,omitempty"`
}

// File is a file of the snapshot.
type File struct {
	// Name is "mem.img", "state.bin" or "mem.sums".
	Name string `json:"name"`
	// Size in bytes, holes included.
	Size int64 `json:"size"`
	// Sum is a SHA-256 in hexadecimal: of the content for state.bin and mem.sums,
	// and for mem.img of each 4096-byte page that is not all zeros, in ascending order,
	// each after its number as a little-endian 64-bit integer. It so does not
	// depend on which zeros are holes.
	Sum string `json:"sum"`
}

// namePattern is docker's rule for names.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// maxName is what a file name holds, with room for what is put around it. As
// {0,127} in the pattern it would cost each start of each command half a
// millisecond, in which Go compiles 127 states.
const maxName = 128

// isName tells whether name can name a snapshot.
func isName(name string) bool { return len(name) <= maxName && namePattern.MatchString(name) }

// CheckName returns an error when name cannot name a snapshot.
func CheckName(name string) error {
	if !isName(name) {
		return fmt.Errorf("%w %q: use 1 to 128 letters, digits, _, . and -, starting with a letter or digit", ErrName, name)
	}
	return nil
}

// pages of guest memory.
func (m *Manifest) pages() int64 { return m.Machine.MemoryBytes / pageSize }

// sum returns what the field Sum has to be.
func (m Manifest) sum() (string, error) {
	m.Sum = ""
	b, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("encode manifest: %w", err)
	}
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:]), nil
}

// encode fills in the sum and returns the manifest as it is stored.
func (m *Manifest) encode() ([]byte, error) {
	// The sum has to be of what is read back: without a monotonic clock, and with
	// bytes that are no UTF-8 (an environment may have them) replaced.
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	var back Manifest
	if err := json.Unmarshal(b, &back); err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	*m = back
	s, err := m.sum()
	if err != nil {
		return nil, err
	}
	m.Sum = s
	b, err = json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	if len(b) >= maxManifest {
		return nil, fmt.Errorf("encode manifest: %d bytes are more than the %d allowed", len(b), maxManifest)
	}
	return append(b, '\n'), nil
}

// ParseManifest reads a manifest. It is strict: an unknown field, anything
// after the object, a sum that does not match or a value out of range is an
// error that wraps ErrDamaged.
func ParseManifest(r io.Reader) (*Manifest, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	if len(b) > maxManifest {
		return nil, fmt.Errorf("%w: the manifest is longer than %d bytes", ErrDamaged, maxManifest)
	}
	// The schema first: a newer one may have fields that are unknown here, and
	// "edited" would be the wrong thing to say then.
	var head struct {
		Schema int `json:"schema"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("%w: the manifest is not JSON: %w", ErrDamaged, err)
	}
	if head.Schema != SchemaVersion {
		return nil, fmt.Errorf("manifest has schema %d, and this fcvm reads %d; use the fcvm that made the snapshot", head.Schema, SchemaVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var m Manifest
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("%w: the manifest was edited: %w", ErrDamaged, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("%w: the manifest was edited: something follows it", ErrDamaged)
	}
	want, err := m.sum()
	if err != nil {
		return nil, err
	}
	if m.Sum != want {
		return nil, fmt.Errorf("%w: the manifest was edited: its sum does not match", ErrDamaged)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return &m, nil
}

// check tells whether the values make sense together. A matching sum is no
// proof: anybody can compute it.
func (m *Manifest) check() error {
	if err := CheckName(m.Name); err != nil {
		return err
	}
	if m.Parent != "" {
		if err := CheckName(m.Parent); err != nil {
			return err
		}
	}
	if m.Image.ID == "" || m.Engine.Name == "" || m.Engine.Version == "" {
		return errors.New("manifest names no image or no engine")
	}
	if m.Machine.CPUs < 1 || m.Machine.CPUs > 4096 {
		return fmt.Errorf("manifest has %d CPUs", m.Machine.CPUs)
	}
	if m.Machine.MemoryBytes <= 0 || m.Machine.MemoryBytes > maxMemory {
		return fmt.Errorf("manifest has %d bytes of memory", m.Machine.MemoryBytes)
	}
	if len(m.Regions) == 0 {
		return errors.New("manifest has no memory regions")
	}
	end := int64(0)
	for _, r := range m.Regions {
		// In this order nothing overflows: sizes are bounded before they are added.
		if r.Offset != end || r.Size <= 0 || r.Size > maxMemory || r.Size%pageSize != 0 || end+r.Size > m.Machine.MemoryBytes {
			return fmt.Errorf("manifest has a memory region of %d bytes at %d", r.Size, r.Offset)
		}
		end += r.Size
	}
	if end != m.Machine.MemoryBytes {
		return fmt.Errorf("memory regions hold %d of %d bytes", end, m.Machine.MemoryBytes)
	}
	if len(m.Files) != 3 || m.Files[0].Name != memoryFile || m.Files[1].Name != stateFile || m.Files[2].Name != sumsFile {
		return errors.New("manifest does not list mem.img, state.bin and mem.sums")
	}
	if m.Files[0].Size != m.Machine.MemoryBytes || m.Files[1].Size <= 0 || m.Files[2].Size != pagesum.FileSize(m.pages()) {
		return errors.New("manifest has files of a wrong size")
	}
	for _, f := range m.Files {
		if b, err := hex.DecodeString(f.Sum); err != nil || len(b) != sha256.Size {
			return fmt.Errorf("manifest has no checksum of %s", f.Name)
		}
	}
	return nil
}
