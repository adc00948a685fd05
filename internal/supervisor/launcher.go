package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"fcvm/internal/api"
	"fcvm/internal/buildinfo"
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

// program is the path of the page server's.
func program() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find %s: %w", pageServerName, err)
	}
	// Of a supervisor whose own program was replaced.
	self = strings.TrimSuffix(self, " (deleted)")
	binary := filepath.Join(filepath.Dir(self), pageServerName)
	if _, err := os.Stat(binary); errors.Is(err, fs.ErrNotExist) {
		return "", &api.Error{
			Code:    api.CodeUnavailable,
			Message: fmt.Sprintf("the page server %s is not there", binary),
			Hint:    "install fcvm's three programs into one directory: `go install ./cmd/...`",
		}
	}
	return binary, nil
}

func (launcher) Launch(ctx context.Context, c PageServerConfig) (PageServer, error) {
	binary, err := program()
	if err != nil {
		return nil, err
	}
	config := keeper.Config{
		Binary: binary, Dir: c.Dir, Runtime: c.Runtime, MemFile: c.Memory, Size: c.Size, PageSums: c.PageSums,
		WorkingSet: c.WorkingSet, ID: c.ID, Policy: pageserver.Policy(c.Policy), IdleTimeout: orphanTimeout, Inherit: c.Inherit,
		Replaced: onReplaced(c.Replaced),
	}
	if c.Fill {
		config.Fill.BytesPerSecond = fillRate
	}
	runs, err := os.Stat(binary)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", binary, err)
	}
	k, err := keeper.Start(ctx, config)
	if err != nil {
		return nil, err
	}
	return &keptServer{k, runs}, nil
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
	// Of another user's program nothing is known; it is not upgraded.
	runs, _ := os.Stat(fmt.Sprintf("/proc/%d/exe", k.PID()))
	return &keptServer{k, runs}, nil
}

// keptServer makes a [keeper.Keeper] a [PageServer].
type keptServer struct {
	*keeper.Keeper
	// runs is the program that the page server was started from, or nil. Only
	// Upgrade looks at it, which is not called concurrently.
	runs os.FileInfo
}

func (k *keptServer) Handle() (json.RawMessage, error) {
	b, err := json.Marshal(k.Keeper.Handle())
	if err != nil {
		return nil, fmt.Errorf("encode page server's handle: %w", err)
	}
	return b, nil
}

func (k *keptServer) Stats(ctx context.Context) (PageServerStats, error) {
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

// Upgrade implements [PageServer]. A program of another version is none for this
// supervisor, and one that does not run must not become the only one.
func (k *keptServer) Upgrade(ctx context.Context) (bool, error) {
	binary, err := program()
	if err != nil {
		return false, err
	}
	installed, err := os.Stat(binary)
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", binary, err)
	}
	if k.runs == nil || os.SameFile(k.runs, installed) {
		return false, nil
	}
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return false, fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	if want := pageServerName + " " + buildinfo.Get(); strings.TrimSpace(string(out)) != want {
		return false, fmt.Errorf("%s says that it is %.80q, and this fcvm needs %s", binary, out, want)
	}
	if err := k.Keeper.Upgrade(ctx, binary); err != nil {
		return false, err
	}
	k.runs = installed
	return true, nil
}
