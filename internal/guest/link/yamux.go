package link

import (
	"errors"
	"io"
	"time"

	"github.com/hashicorp/yamux"
)

// errSessionOver is returned to a yamux session whose turn is over.
var errSessionOver = errors.New("session is over")

// muxConfig is without keep-alives, which would wake idle guests and dirty
// their pages, and without short time limits: the stream stands still as long as the
// VM is paused. A dead guest shows in the stream's end.
func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = 16
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = 24 * time.Hour
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 24 * time.Hour
	c.LogOutput = io.Discard
	return c
}

// transport is what yamux takes for its connection: it reads from a pipe that
// the link's reader feeds, and writes DATA frames.
type transport struct {
	*io.PipeReader
	write func([]byte) (int, error)
	done  func()
}

func (t *transport) Write(p []byte) (int, error) { return t.write(p) }

func (t *transport) Close() error {
	t.done()
	return t.CloseWithError(errSessionOver)
}
