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
)

// pageServerName is the page server's program, beside fcvm itself.
const pageServerName = "uffd_handler"

// orphanTimeout ends a page server whose clones ended while no supervisor ran to
// stop it.
const orphanTimeout = "30s"

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
	p, err := pageserver.Launch(ctx, pageserver.LaunchConfig{
		Binary: binary, Dir: c.Dir, Runtime: c.Runtime, MemFile: c.Memory, Size: c.Size,
		Policy: pageserver.Policy(c.Policy), IdleTimeout: orphanTimeout, Inherit: c.Inherit,
	})
	if err != nil {
		return nil, err
	}
	return pageServerProcess{p}, nil
}

func (launcher) Adopt(ctx context.Context, handle json.RawMessage) (PageServer, error) {
	var h pageserver.Handle
	if err := json.Unmarshal(handle, &h); err != nil {
		return nil, fmt.Errorf("adopt page server: %w", err)
	}
	p, err := pageserver.Adopt(ctx, h)
	if err != nil {
		return nil, err
	}
	return pageServerProcess{p}, nil
}

// pageServerProcess makes a page server's process a [PageServer].
type pageServerProcess struct{ *pageserver.Process }

func (p pageServerProcess) Handle() (json.RawMessage, error) {
	b, err := json.Marshal(p.Process.Handle())
	if err != nil {
		return nil, fmt.Errorf("encode page server's handle: %w", err)
	}
	return b, nil
}

func (p pageServerProcess) Stats(ctx context.Context) (PageServerStats, error) {
	st, err := p.Process.Stats(ctx)
	if err != nil {
		return PageServerStats{}, err
	}
	// The template is a file that the page server writes to and does not map.
	own, err := memstat.Process(p.PID(), nil)
	if err != nil {
		return PageServerStats{}, err
	}
	out := PageServerStats{
		TemplateBytes: st.TemplateBytes, RSSBytes: own.OverheadRSS,
		Sessions: make(map[int]SessionStats, len(st.Sessions)), Failures: map[int]string{},
	}
	for _, s := range st.Sessions {
		out.Sessions[s.PID] = SessionStats{Faults: s.Faults}
		out.Faults += s.Faults
	}
	for _, f := range st.Failures {
		out.Failures[f.PID] = f.Reason
	}
	return out, nil
}
