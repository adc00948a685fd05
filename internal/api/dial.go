package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"fcvm/internal/datadir"
)

// EnvReadyFD names the variable that tells a supervisor started on demand the
// number of the file that it writes "ready" to once it listens. A pipe's end is
// seen at once, alive or dead, and nobody has to poll for a socket.
const EnvReadyFD = "FCVM_READY_FD"

// readyWord is what it writes.
const readyWord = "ready\n"

// startTimeout bounds the wait for a supervisor that was started on demand. It
// re-adopts VMs before it listens, some milliseconds each.
const startTimeout = 30 * time.Second

// maxServeLog is the size at which serve.log is put aside as serve.log.1.
const maxServeLog = 4 << 20

// DialOptions say how to reach a supervisor.
type DialOptions struct {
	// Start starts a supervisor when none listens. Without it, Dial fails with
	// an error that wraps [ErrNoSupervisor].
	Start bool
	// Version of the caller. A supervisor of another one is refused; empty
	// accepts any.
	Version string
	// Binary is the fcvm to start; empty for this very program.
	Binary string
}

// ErrNoSupervisor means that no supervisor runs for the data directory.
var ErrNoSupervisor = errors.New("no supervisor runs")

// Dial connects to the supervisor of a data directory and, if asked to, starts
// one where none runs: `fcvm serve --on-demand` in a session of its own, which
// logs to serve.log and goes away some time after its last VM and client.
func Dial(ctx context.Context, l *datadir.Layout, o DialOptions) (*Client, error) {
	c := NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", l.Socket())
	})
	// Twice: a supervisor may leave at the moment that it is called.
	for try := 0; ; try++ {
		info, err := c.Info(ctx)
		if err == nil {
			c.info = info
			return c, checkVersion(c, info, o.Version)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if e := (*Error)(nil); !errors.As(err, &e) || e.Code != CodeUnavailable {
			return nil, err
		}
		if !o.Start {
			return nil, fmt.Errorf("reach supervisor at %s: %w", l.Socket(), ErrNoSupervisor)
		}
		if try == 2 {
			return nil, &Error{
				Code:    CodeUnavailable,
				Message: "supervisor does not answer: " + err.Error(),
				Hint:    "see " + l.ServeLog(),
			}
		}
		if err := startServe(ctx, l, o.Binary); err != nil {
			return nil, err
		}
	}
}

func checkVersion(c *Client, info ServerInfo, want string) error {
	if want == "" || info.Version == want {
		return nil
	}
	_ = c.Close()
	return &Error{
		Code:    CodeUnavailable,
		Message: fmt.Sprintf("the supervisor that runs is version %s, this fcvm is %s", info.Version, want),
		Hint:    "`fcvm serve --stop` ends it; its VMs run on, and the next command starts the new one",
	}
}

// startServe starts a supervisor and returns when it listens, or when another
// one does.
func startServe(ctx context.Context, l *datadir.Layout, binary string) error {
	if binary == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find fcvm to start the supervisor: %w", err)
		}
		binary = self
	}
	log, err := openServeLog(l.ServeLog())
	if err != nil {
		return err
	}
	defer log.Close()
	begin, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open supervisor's log: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	defer r.Close()
	// Not CommandContext: the supervisor outlives this process and its context.
	cmd := exec.Command(binary, "serve", "--on-demand", "--data-dir", l.Dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), EnvReadyFD+"=3")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	defer func() { _ = cmd.Process.Release() }()

	deadline := time.Now().Add(startTimeout)
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = r.SetReadDeadline(deadline)
	word := make([]byte, len(readyWord))
	_, err = io.ReadFull(r, word)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return serveFailed(fmt.Sprintf("supervisor did not come up within %v", startTimeout), l, begin)
	case err == nil && string(word) == readyWord:
		return nil
	}
	// It died, perhaps because another one was quicker: then that one answers.
	if conn, err := net.Dial("unix", l.Socket()); err == nil {
		return conn.Close()
	}
	return serveFailed("supervisor did not start", l, begin)
}

func openServeLog(path string) (*os.File, error) {
	if fi, err := os.Stat(path); err == nil && fi.Size() > maxServeLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("put supervisor's log aside: %w", err)
		}
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open supervisor's log: %w", err)
	}
	return log, nil
}

// serveFailed returns an error with what the supervisor logged since begin.
func serveFailed(what string, l *datadir.Layout, begin int64) error {
	e := &Error{Code: CodeUnavailable, Message: what, Hint: "its log is " + l.ServeLog()}
	f, err := os.Open(l.ServeLog())
	if err != nil {
		return e
	}
	defer f.Close()
	text, _ := io.ReadAll(io.NewSectionReader(f, begin, 64<<10))
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	if n := len(lines); n > 10 {
		lines = lines[n-10:]
	}
	if tail := string(bytes.Join(lines, []byte("\n"))); tail != "" {
		e.Message += ":\n" + tail
	}
	return e
}
