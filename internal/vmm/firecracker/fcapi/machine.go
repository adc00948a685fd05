package fcapi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
)

// MachineConfig is the VM's processor and memory.
type MachineConfig struct {
	// VCPUs is 1 to 32.
	VCPUs int `json:"vcpu_count"`
	// MemoryMiB is the guest's memory, in MiB.
	MemoryMiB int64 `json:"mem_size_mib"`
	// TrackDirtyPages makes diff snapshots possible, and costs a fault for each
	// page that is written.
	TrackDirtyPages bool `json:"track_dirty_pages,omitempty"`
	// HugePages is "2M", or empty for pages of 4 KiB.
	HugePages string `json:"huge_pages,omitempty"`
}

// SetMachineConfig is allowed before the VM starts, as everything in this file is
// unless it says otherwise.
func (c *Client) SetMachineConfig(ctx context.Context, m MachineConfig) error {
	return c.put(ctx, "/machine-config", m, nil)
}

// BootSource is the guest's kernel.
type BootSource struct {
	// Kernel is the path of an uncompressed ELF kernel.
	Kernel string `json:"kernel_image_path"`
	// Initrd may be empty.
	Initrd string `json:"initrd_path,omitempty"`
	// Args is the whole command line; Firecracker appends its devices.
	Args string `json:"boot_args,omitempty"`
}

// SetBootSource says what is booted.
func (c *Client) SetBootSource(ctx context.Context, b BootSource) error {
	return c.put(ctx, "/boot-source", b, nil)
}

// SetCPUConfig says what the guest sees of the processor, by a CPU template in
// Firecracker's own format.
func (c *Client) SetCPUConfig(ctx context.Context, template []byte) error {
	return c.put(ctx, "/cpu-config", json.RawMessage(template), nil)
}

// Drive is a virtio block device.
type Drive struct {
	// ID holds letters, digits and underscores.
	ID string `json:"drive_id"`
	// Path is opened anew, as it is written here, by each clone.
	Path string `json:"path_on_host"`
	// Root appends root=/dev/vda to the command line.
	Root bool `json:"is_root_device"`
	// ReadOnly opens the file so.
	ReadOnly bool `json:"is_read_only"`
}

// AddDrive adds a drive, or replaces the one of that ID. Drives appear to the
// guest in this order, the root first.
func (c *Client) AddDrive(ctx context.Context, d Drive) error {
	return c.put(ctx, "/drives/"+url.PathEscape(d.ID), d, nil)
}

// NetworkInterface is a virtio network device on a TAP.
type NetworkInterface struct {
	ID string `json:"iface_id"`
	// HostDevice is the TAP's name in Firecracker's network namespace.
	HostDevice string `json:"host_dev_name"`
	// MAC is the guest's; Firecracker chooses one if it is empty.
	MAC string `json:"guest_mac,omitempty"`
	// MTU that the guest is told, 68 to 65535, or 0 ([MTU]).
	MTU int `json:"mtu,omitempty"`
}

// AddNetworkInterface adds an interface, or replaces the one of that ID.
func (c *Client) AddNetworkInterface(ctx context.Context, n NetworkInterface) error {
	return c.put(ctx, "/network-interfaces/"+url.PathEscape(n.ID), n, map[Feature]bool{MTU: n.MTU != 0})
}

// Vsock is the socket device.
type Vsock struct {
	// CID is the guest's address, 3 or more. VMs may have the same one: each has
	// a socket of its own.
	CID uint32 `json:"guest_cid"`
	// Socket is where Firecracker listens for connections to the guest. Who
	// connects writes "CONNECT PORT\n" and reads "OK PORT\n" first.
	Socket string `json:"uds_path"`
}

// SetVsock adds the device.
func (c *Client) SetVsock(ctx context.Context, v Vsock) error { return c.put(ctx, "/vsock", v, nil) }

// AddEntropy adds a virtio-rng device.
func (c *Client) AddEntropy(ctx context.Context) error {
	return c.put(ctx, "/entropy", struct{}{}, nil)
}

// Logger says where Firecracker logs to.
type Logger struct {
	// Path of a file or a named pipe that exists.
	Path string `json:"log_path"`
	// Level is Error, Warning, Info or Debug.
	Level string `json:"level,omitempty"`
	// ShowLevel begins each line with its level.
	ShowLevel bool `json:"show_level,omitempty"`
}

// SetLogger is allowed once, also before a load.
func (c *Client) SetLogger(ctx context.Context, l Logger) error {
	return c.put(ctx, "/logger", l, nil)
}

// SetMetrics has Firecracker append its metrics to a file that exists, an object
// of JSON each minute. It is allowed once, also before a load.
func (c *Client) SetMetrics(ctx context.Context, path string) error {
	return c.put(ctx, "/metrics", struct {
		Path string `json:"metrics_path"`
	}{path}, nil)
}

// Action is what PUT /actions does.
type Action string

// The actions. InstanceStart boots the VM that was configured, FlushMetrics writes
// the metrics of a running one at once.
const (
	InstanceStart Action = "InstanceStart"
	FlushMetrics  Action = "FlushMetrics"
)

// Do carries out an action.
func (c *Client) Do(ctx context.Context, a Action) error {
	return c.put(ctx, "/actions", struct {
		Type Action `json:"action_type"`
	}{a}, nil)
}

// Running is [Instance.State] of a VM that is neither paused nor yet to be started.
const Running = "Running"

// Instance is what Firecracker says about its VM.
type Instance struct {
	ID string `json:"id"`
	// State is "Not started", "Running" or "Paused".
	State string `json:"state"`
}

// Instance asks for it, at any time.
func (c *Client) Instance(ctx context.Context) (Instance, error) {
	var i Instance
	return i, c.do(ctx, http.MethodGet, "/", nil, &i)
}
