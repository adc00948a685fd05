package supervisor

import (
	"context"
	"encoding/json"
	"os"

	"fcvm/internal/image"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
	"fcvm/internal/workingset"
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
	// Adopt takes over a running one; replaced is as in [PageServerConfig]. The error
	// wraps vmm.ErrGone when it ended.
	Adopt(ctx context.Context, handle json.RawMessage, replaced func(json.RawMessage)) (PageServer, error)
}

// PageServerConfig says what a page server serves.
type PageServerConfig struct {
	// Dir is where its log goes, Runtime where its sockets; both exist.
	Dir, Runtime string
	// Memory is the snapshot's memory file, of Size bytes.
	Memory string
	Size   int64
	// PageSums and WorkingSet are paths, too; an empty one for what is not wanted.
	PageSums, WorkingSet string
	// ID is the snapshot's, which the working set is bound to.
	ID     workingset.ID
	Policy string
	// Fill has the template filled in the background.
	Fill bool
	// Inherit are files that it keeps open, such as leases.
	Inherit []*os.File
	// Replaced is told of the handle of each successor of a page server that
	// died. It is not called concurrently.
	Replaced func(handle json.RawMessage)
}

// PageServer is one that runs, and is replaced when it dies. Its methods may be
// called concurrently.
type PageServer interface {
	PID() int
	// Handle is what Adopt needs.
	Handle() (json.RawMessage, error)
	// Socket is where VMMs shake hands.
	Socket() string
	// Template opens the template for reading; the caller closes it.
	Template() (*os.File, error)
	Stats(ctx context.Context) (PageServerStats, error)
	// Record tells it that the guest of the VMM with this pid begins to run just now,
	// or that it waits, so that the working set gets what guests ask for first.
	Record(ctx context.Context, pid int, on bool) error
	// Upgrade replaces it by the program that is installed now, and says whether that
	// is another one. It is not called concurrently.
	Upgrade(ctx context.Context) (bool, error)
	// Failure says why the VMM with this pid was killed, or "".
	Failure(pid int) string
	// Done is closed when it has ended and cannot be replaced; Err then says why.
	Done() <-chan struct{}
	Err() error
	// Stop ends it and waits for the end.
	Stop(ctx context.Context) error
	// Release lets go of it; it runs on.
	Release()
}

// PageServerStats is what a page server tells of itself.
type PageServerStats struct {
	pageserver.Stats
	// RSSBytes of the process, without the template.
	RSSBytes int64
	// Handovers to successors.
	Handovers keeper.Handovers
}
