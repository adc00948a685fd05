package proto

import "time"

// Version of the protocol between host and agent. It is part of the greeting; a
// host refuses an agent of another version, which a snapshot of an older fcvm
// may hold.
const Version = 1

// Method names a request. Each request has a stream of its own: the host writes
// a [Request] with [WriteMessage], the agent answers as the method's comment says.
type Method string

// The methods of the agent.
const (
	// MethodInfo is answered with [Info].
	MethodInfo Method = "info"
	// MethodStart starts the container's process; answered with [Empty].
	MethodStart Method = "start"
	// MethodSignal sends Request.Signal to the container's process; [Empty].
	MethodSignal Method = "signal"
	// MethodClock sets the guest's clock to Request.Wall; [Empty].
	MethodClock Method = "clock"
	// MethodExec starts a process; FrameReady follows, then its frames.
	MethodExec Method = "exec"
	// MethodAttach joins the container's process's streams; FrameReady follows,
	// then its frames. Output from before is not repeated.
	MethodAttach Method = "attach"
	// MethodCopyIn unpacks a tar stream that the host sends as FrameStdin,
	// ended by FrameStdinEOF; answered with [Empty].
	MethodCopyIn Method = "copy-in"
	// MethodCopyOut is answered with [FileInfo]; a tar stream follows as
	// FrameStdout, ended by FrameExit 0 or FrameError.
	MethodCopyOut Method = "copy-out"
)

// Request is the first message on a stream. Only the method's own field is set.
type Request struct {
	Method Method         `json:"method"`
	Start  *ContainerSpec `json:"start,omitempty"`
	Exec   *ExecRequest   `json:"exec,omitempty"`
	Attach *AttachRequest `json:"attach,omitempty"`
	Signal string         `json:"signal,omitempty"`
	Wall   time.Time      `json:"wall,omitzero"`
	// Path in the guest, for MethodCopyIn and MethodCopyOut.
	Path string `json:"path,omitempty"`
}

// Empty is the answer of a request that has nothing to tell but success.
type Empty struct{}

// ContainerSpec is the container's process, as the image and the user want it.
type ContainerSpec struct {
	// Args is the command with its arguments, never empty.
	Args []string `json:"args"`
	// Env holds NAME=value. PATH, HOME, HOSTNAME, and TERM with a TTY, are added
	// where they are missing.
	Env []string `json:"env,omitempty"`
	// WorkDir is made when it does not exist; empty means "/".
	WorkDir string `json:"workdir,omitempty"`
	// User is "name", "uid", "name:group" or "uid:gid"; empty means root.
	User     string `json:"user,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	TTY      bool   `json:"tty,omitempty"`
	// OpenStdin keeps the process's stdin open for [AttachRequest]; without it
	// stdin is /dev/null.
	OpenStdin bool `json:"open_stdin,omitempty"`
	// StdinOnce closes stdin when the first attached client has sent
	// FrameStdinEOF or went away.
	StdinOnce bool `json:"stdin_once,omitempty"`
	// Rows and Cols of the TTY; 0 means 24 × 80.
	Rows uint16 `json:"rows,omitempty"`
	Cols uint16 `json:"cols,omitempty"`
	// Nameservers and SearchDomains of /etc/resolv.conf; when there are none, the
	// kernel command line's fcvm.dns is used.
	Nameservers   []string `json:"nameservers,omitempty"`
	SearchDomains []string `json:"search_domains,omitempty"`
	// ExtraHosts are "name:ip", for /etc/hosts.
	ExtraHosts []string `json:"extra_hosts,omitempty"`
}

// ExecRequest starts a further process in the VM.
type ExecRequest struct {
	// Args is the command with its arguments, never empty.
	Args []string `json:"args"`
	// Env is added to the container's environment.
	Env []string `json:"env,omitempty"`
	// WorkDir must exist; empty means the container's.
	WorkDir string `json:"workdir,omitempty"`
	// User as in [ContainerSpec]; empty means the container's.
	User string `json:"user,omitempty"`
	TTY  bool   `json:"tty,omitempty"`
	// Stdin is set when FrameStdin frames will come; without it stdin is
	// /dev/null.
	Stdin bool   `json:"stdin,omitempty"`
	Rows  uint16 `json:"rows,omitempty"`
	Cols  uint16 `json:"cols,omitempty"`
}

// AttachRequest joins the streams of the container's process.
type AttachRequest struct {
	// Stdin is set when FrameStdin frames will come.
	Stdin bool `json:"stdin,omitempty"`
	// Rows and Cols resize the TTY, when there is one and they are not 0.
	Rows uint16 `json:"rows,omitempty"`
	Cols uint16 `json:"cols,omitempty"`
}

// Info is what the agent knows about itself.
type Info struct {
	// BootID is the kernel's random boot_id; a clone has its golden VM's.
	BootID string `json:"boot_id"`
	// AgentVersion is fcvm's version when fcvm-init was built.
	AgentVersion string `json:"agent_version"`
	Kernel       string `json:"kernel"`
	Hostname     string `json:"hostname"`
	// ContainerStarted is set once MethodStart has succeeded, ContainerRunning
	// as long as the process lives.
	ContainerStarted bool `json:"container_started"`
	ContainerRunning bool `json:"container_running"`
	// ContainerPID in the guest, 0 when there is none.
	ContainerPID int `json:"container_pid"`
	// Uptime of the guest when it answered, in nanoseconds.
	Uptime time.Duration `json:"uptime_ns"`
}

// FileInfo describes what MethodCopyOut sends.
type FileInfo struct {
	// Name is the last part of the path, and the first part of every tar entry.
	Name string `json:"name"`
	Size int64  `json:"size"`
	// Mode is an fs.FileMode.
	Mode uint32 `json:"mode"`
	Dir  bool   `json:"dir"`
}
