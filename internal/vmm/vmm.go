// Package vmm says what an engine must do: start a VM from a kernel, save its
// device state, start a clone from that, and be taken over by a supervisor that
// was restarted. Every engine passes the suite in vmmtest.
//
// A VM's process outlives the supervisor that started it. What a later one
// needs to adopt it is its [Handle], which is kept in the VM's state file.
package vmm

import (
	"context"
	"errors"
	"net"
	"os"
)

// Sentinels on which callers decide.
var (
	// ErrUnavailable means that the engine cannot be used on this host.
	ErrUnavailable = errors.New("engine not available")
	// ErrGone means that the VM's process has ended.
	ErrGone = errors.New("VM is not running")
	// ErrNoJail means that the engine cannot lock VMs up.
	ErrNoJail = errors.New("this engine has no jail; use --engine firecracker")
	// ErrAttach means that the memory of the VMM could not be replaced because
	// ptrace is not allowed here; the caller may fall back to [BackendFile].
	ErrAttach = errors.New("attaching to the VMM is not allowed")
	// ErrNoHugePages means that the engine has no [Machine.HugePages].
	ErrNoHugePages = errors.New("this engine gives guests no huge pages; use --engine firecracker")
	// ErrNoNetwork means that ports of a VM with [NetworkNone] cannot be published.
	ErrNoNetwork = errors.New("publish ports: the VM has no network; give it one with `fcvm run --network`")
)

// Info describes an engine on this host.
type Info struct {
	// Name is "qemu" or "firecracker".
	Name string `json:"name"`
	// Version as the program tells it, such as "7.2.22".
	Version string `json:"version"`
	// Path of the program.
	Path string `json:"path"`
	// Accel is "kvm" or "tcg".
	Accel string `json:"accel"`
	// CPU is the CPU model that guests get.
	CPU string `json:"cpu"`
	// Network says whether guests have one. See [Choose].
	Network bool `json:"network"`
	// Networks that guests may have; the first is the default.
	Networks []Network `json:"networks"`
	// HugePages says whether guests' memory may be of huge pages.
	HugePages bool `json:"huge_pages"`
}

// Engine starts VMs. Its methods may be called concurrently.
type Engine interface {
	// Info says what the engine is. It starts no VM. The error wraps
	// ErrUnavailable and tells what to install or change.
	Info(ctx context.Context) (Info, error)
	// Boot starts a VM from a kernel. It returns as soon as the VMM runs and
	// answers; the guest is then still booting. When ctx ends first, nothing is
	// left behind.
	Boot(ctx context.Context, c BootConfig) (VM, error)
	// Restore starts a VM from a snapshot and resumes it. When it returns the
	// guest runs, or with Paused could.
	Restore(ctx context.Context, c RestoreConfig) (VM, error)
	// Adopt takes over a VM that an earlier supervisor started. The error wraps
	// ErrGone when the process ended (a recycled pid is not mistaken for it).
	Adopt(ctx context.Context, h Handle) (VM, error)
}

// Machine is what is alike for a VM and every clone of it.
type Machine struct {
	// MemoryBytes is the guest's memory, a multiple of 2 MiB.
	MemoryBytes int64 `json:"memory_bytes"`
	// CPUs is the number of virtual CPUs, at least 1.
	CPUs int `json:"cpus"`
	// HugePages says that the memory is of pages of 2 MiB ([Info.HugePages]). A clone then
	// has to have its memory Copied.
	HugePages bool `json:"huge_pages,omitempty"`
	// RootFS is the read-only EROFS image, an absolute path.
	RootFS string `json:"rootfs"`
	// Network is the guest's; empty means the engine's own choice, as in snapshots from before
	// there was one.
	Network Network `json:"network,omitempty"`
}

// Network is how a guest reaches others, and is reached.
type Network string

// The networks.
const (
	// NetworkUser is the VMM's own user-mode network (QEMU).
	NetworkUser Network = "user"
	// NetworkTAP is a TAP in a network namespace of the VMM's own, with a user-mode network
	// of fcvm's behind it (internal/network/tapnet).
	NetworkTAP Network = "tap"
	// NetworkTAPHost is the same, and the guest reaches the host's loopback, too, as 10.0.2.2.
	NetworkTAPHost Network = "tap-host"
	// NetworkNone is no network device.
	NetworkNone Network = "none"
)

// TAP tells whether the VM has a TAP.
func (n Network) TAP() bool { return n == NetworkTAP || n == NetworkTAPHost }

// Place is where one VM keeps its files. All directories exist.
type Place struct {
	// ID of the VM, for messages and process titles.
	ID string
	// Dir holds console.log (the guest's serial console), container.log (what the
	// guest's agent logs, read by proto.LogFile) and vmm.log (what the VMM itself
	// prints).
	Dir string
	// Runtime holds sockets; its path is short.
	Runtime string
	// Jail locks the VMM up: it runs as a user of its own, in a directory below Dir that
	// it takes for the root of all, with limits, and sees no process and no network but
	// its own. Once the VM has ended, jail.Remove removes what is left of that.
	Jail bool
	// Inherit are files that the VMM keeps open for its life, such as leases
	// (flock). The caller closes its own copies when the start returned.
	Inherit []*os.File
}

// Port is a published port.
type Port struct {
	// HostIP to listen on; empty means all addresses.
	HostIP string `json:"host_ip,omitempty"`
	// HostPort to listen on, 1 to 65535.
	HostPort int `json:"host_port"`
	// GuestPort that connections reach, 1 to 65535.
	GuestPort int `json:"guest_port"`
	// Proto is "tcp" or "udp".
	Proto string `json:"proto"`
}

// BootConfig starts a VM from a kernel.
type BootConfig struct {
	Place
	Machine
	Ports []Port
	// Kernel and Initrd are absolute paths, Cmdline is appended to what the
	// engine itself needs (console, TSC).
	Kernel, Initrd, Cmdline string
}

// Backend is how a clone gets its memory.
type Backend string

// The mem backends, in Firecracker's own terms.
const (
	BackendUFFD Backend = "uffd"
	BackendFile Backend = "file"
)

// Memory tells where a clone's memory comes from.
type Memory struct {
	// Backend chooses between the fields below.
	Backend Backend
	// File is mapped MAP_PRIVATE as the guest's memory: the page server's
	// template (BackendUFFD), or the snapshot's memory file (BackendFile).
	// Opened read-only. The caller closes it.
	File *os.File
	// Socket is the page server's (BackendUFFD): the VMM, or the engine on its
	// behalf, shakes hands there.
	Socket string
	// Copied says that the page server fills nothing but the clone's own memory
	// (its policy is copy), so that the VMM need not map File.
	Copied bool
	// Merge has the kernel look for pages that several clones hold alike, and keep
	// one of each (KSM). Only for memory that is Copied; see [fcvm/internal/vmm/merge].
	Merge bool
}

// RestoreConfig starts a clone.
type RestoreConfig struct {
	Place
	Machine
	Ports  []Port
	Memory Memory
	// State is the device state that [VM.SaveState] wrote.
	State string
	// Paused leaves the guest where the snapshot was taken, until [VM.Resume].
	Paused bool
}

// Region is a range of guest memory inside the VMM's address space.
type Region struct {
	// Addr is the virtual address in the VMM.
	Addr uint64 `json:"addr"`
	// Size in bytes, a multiple of the page size.
	Size int64 `json:"size"`
	// Offset of the region in the snapshot's memory file.
	Offset int64 `json:"offset"`
}

// Handle is what a restarted supervisor needs to adopt a VM.
type Handle struct {
	Engine string `json:"engine"`
	PID    int    `json:"pid"`
	// StartTime of the process in clock ticks since boot (/proc/PID/stat, field
	// 22): with it a recycled pid is told from the VM's.
	StartTime uint64   `json:"start_time"`
	Dir       string   `json:"dir"`
	Runtime   string   `json:"runtime"`
	Regions   []Region `json:"regions"`
	// Network is the process behind a TAP; nil with other networks.
	Network *NetworkHandle `json:"network,omitempty"`
	// Root is the directory that a jailed VMM takes for the root of all; empty without a
	// jail.
	Root string `json:"root,omitempty"`
}

// NetworkHandle is a process that serves a VM's network. It outlives supervisors, as
// the VMM does.
type NetworkHandle struct {
	PID int `json:"pid"`
	// StartTime as in [Handle].
	StartTime uint64 `json:"start_time"`
}

// VM is a running VM. Its methods may be called concurrently.
type VM interface {
	Handle() Handle
	// Pause stops all vCPUs; Resume lets them go on. Both are idempotent.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Publish publishes further ports, all of them or, with an error, none. The
	// VM may run or be paused.
	Publish(ctx context.Context, ports []Port) error
	// SaveState writes the device state (no memory) of a paused VM to a new
	// file. The VM stays paused.
	SaveState(ctx context.Context, path string) error
	// DialAgent connects to the guest's agent: a raw byte stream. A second
	// connection waits until the first is closed.
	DialAgent(ctx context.Context) (net.Conn, error)
	// Balloon sets the guest's balloon target: the guest gives back memory until
	// it has only this many bytes.
	Balloon(ctx context.Context, guestBytes int64) error
	// Kill ends the VMM at once. It is idempotent.
	Kill() error
	// Release lets go of the VM, which runs on: connections to the VMM are
	// closed, so that another process can adopt it. Done may stay open for ever
	// after, and the other methods fail. It is idempotent.
	Release() error
	// Done is closed when the VMM's process has ended, however it ended.
	Done() <-chan struct{}
	// Tail returns the end of what the VMM and the guest's console printed, at
	// most some 20 lines, for an error message.
	Tail() string
}
