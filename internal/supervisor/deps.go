package supervisor

import (
	"context"
	"encoding/json"
	"os"

	"fcvm/internal/image"
)

// Images is what the supervisor needs of an image store.
type Images interface {
	// Get finds an image by reference or ID.
	Get(refOrID string) (*image.Image, error)
	// Lease keeps the image from being removed until the file is closed
	// everywhere.
	Lease(id string) (*os.File, error)
}

// PageServers starts page servers and takes them over.
type PageServers interface {
	Launch(ctx context.Context, c PageServerConfig) (PageServer, error)
	// Adopt takes over a running one. The error wraps vmm.ErrGone when it ended.
	Adopt(ctx context.Context, handle json.RawMessage) (PageServer, error)
}

// PageServerConfig says what a page server serves.
type PageServerConfig struct {
	// Dir is where its log goes, Runtime where its sockets; both exist.
	Dir, Runtime string
	// Memory is the snapshot's memory file.
	Memory string
	Size   int64
	Policy string
	// Inherit are files that it keeps open, such as leases.
	Inherit []*os.File
}

// PageServer is one that runs. Its methods may be called concurrently.
type PageServer interface {
	PID() int
	// Handle is what Adopt needs.
	Handle() (json.RawMessage, error)
	// Socket is where VMMs shake hands.
	Socket() string
	// Template opens the template for reading; the caller closes it.
	Template() (*os.File, error)
	Stats(ctx context.Context) (PageServerStats, error)
	// Done is closed when the process has ended; Err then says why.
	Done() <-chan struct{}
	Err() error
	// Stop ends it and waits for the end.
	Stop(ctx context.Context) error
	// Release lets go of it; it runs on.
	Release()
}

// PageServerStats is what a page server tells of itself.
type PageServerStats struct {
	TemplateBytes int64
	// RSSBytes of the process, without the template.
	RSSBytes int64
	// Faults of the sessions that run.
	Faults uint64
	// Sessions by the pid of their VMM.
	Sessions map[int]SessionStats
	// Failures say why the page server ended a VMM, by its pid.
	Failures map[int]string
}

// SessionStats is what a page server does for one VM.
type SessionStats struct {
	Faults uint64
}
