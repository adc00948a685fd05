package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"fcvm/internal/api"
	"fcvm/internal/memstat"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/keeper"
)

// pageServerName is the page server's program, beside fcvm itself.
const pageServerName = "uffd_handler"

// orphanTimeout ends a page server whose clones ended while no supervisor ran to
// stop it.
const orphanTimeout = "30s"

// fillRate is how fast templates are filled in the background, in bytes per second:
// the disk has more to do, and a guest of 1 GiB is filled in 4 s.
const fillRate = 256 << 20

// launcher starts this build's page servers.
type launcher struct{}

func (launcher) Launch(ctx context.Context, c PageServerConfig) (PageServer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", pageServerName, err)
	}
	binary := filepath.Join(filepath.Dir(self), pageServerName)
	if _, err := os.Stat(binary); errors.Is(err, fs.ErrNotExist) {
		return nil, &api.Error{
			Code:    api.CodeUnavailable,
			Message: fmt.Sprintf("the page server %s is not there", binary),
			Hint:    "install fcvm's three programs into one directory: `go install ./cmd/...`",
		}
	}
	config := keeper.Config{
		Binary: binary, Dir: c.Dir, Runtime: c.Runtime, MemFile: c.Memory, Size: c.Size, PageSums: c.PageSums,
		WorkingSet: c.WorkingSet, ID: c.ID, Policy: pageserver.Policy(c.Policy), IdleTimeout: orphanTimeout, Inherit: c.Inherit,
		Replaced: onReplaced(c.Replaced),
	}
	if c.Fill {
		config.Fill.BytesPerSecond = fillRate
	}
	k, err := keeper.Start(ctx, config)
	if err != nil {
		return nil, err
	}
	return keptServer{k}, nil
}

// onReplaced encodes handles.
func onReplaced(told func(json.RawMessage)) func(keeper.Handle) {
	return func(h keeper.Handle) {
		b, err := json.Marshal(h)
		if err != nil {
			panic(err) // of strings and numbers
		}
		told(b)
	}
}

func (launcher) Adopt(ctx context.Context, handle json.RawMessage, replaced func(json.RawMessage)) (PageServer, error) {
	var h keeper.Handle
	if err := json.Unmarshal(handle, &h); err != nil {
		return nil, fmt.Errorf("adopt page server: %w", err)
	}
	k, err := keeper.Adopt(ctx, h, onReplaced(replaced), nil)
	if err != nil {
		return nil, err
	}
	return keptServer{k}, nil
}

// keptServer makes a [keeper.Keeper] a [PageServer].
type keptServer struct{ *keeper.Keeper }

func (k keptServer) Handle() (json.RawMessage, error) {
	b, err := json.Marshal(k.Keeper.Handle())
	if err != nil {
		return nil, fmt.Errorf("encode page server's handle: %w", err)
	}
	return b, nil
}

func (k keptServer) Stats(ctx context.Context) (PageServerStats, error) {
	st, err := k.Keeper.Stats(ctx)
	if err != nil {
		return PageServerStats{}, err
	}
	// The template is a file that the page server writes to and does not map.
	own, err := memstat.Process(st.PID, nil)
	if err != nil {
		return PageServerStats{}, err
	}
	return PageServerStats{Stats: st, RSSBytes: own.OverheadRSS, Handovers: k.Handovers()}, nil
}
