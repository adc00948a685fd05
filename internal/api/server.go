package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Backend is what the server serves: the supervisor. Errors that are no *[Error]
// are answered as [CodeInternal]. The context of a call ends when its client
// goes away.
type Backend interface {
	Info(ctx context.Context) ServerInfo
	Run(ctx context.Context, req RunRequest) (VM, error)
	// Clone calls ready, never concurrently, for each clone.
	Clone(ctx context.Context, req CloneRequest, ready func(VM)) error
	List(ctx context.Context) []VM
	Get(ctx context.Context, name string) (VM, error)
	Stop(ctx context.Context, name string, timeout time.Duration) error
	Kill(ctx context.Context, name, signal string) error
	Remove(ctx context.Context, name string, force bool) error
	Wait(ctx context.Context, name string) (VM, error)
	Pause(ctx context.Context, name string) error
	Resume(ctx context.Context, name string) error
	// Exec and Attach return a stream of frames.
	Exec(ctx context.Context, name string, req ExecRequest) (io.ReadWriteCloser, error)
	Attach(ctx context.Context, name string) (io.ReadWriteCloser, error)
	// Logs calls begin once when all is well, and then writes log records.
	Logs(ctx context.Context, name string, req LogsRequest, begin func() io.Writer) error
	CopyIn(ctx context.Context, name, path string, tar io.Reader) error
	CopyOut(ctx context.Context, name, path string) (io.ReadCloser, error)
	// Stats measures all VMs, or only the one called name when that is not empty.
	Stats(ctx context.Context, name string) (Stats, error)
	// Metrics returns a document in Prometheus' text format.
	Metrics(ctx context.Context) ([]byte, error)
	MemoryMap(ctx context.Context, name string) (MemoryMap, error)
	Snapshot(ctx context.Context, req SnapshotRequest) (SnapshotResult, error)
}

// Server answers the API on a unix socket, to its own user and to root alone.
type Server struct {
	backend Backend
	log     *slog.Logger
	http    http.Server
	streams sync.WaitGroup // hijacked connections
	mu      sync.Mutex
	conns   int             // open connections; guarded by mu
	changed func(conns int) // see OnConns
}

// NewServer returns a server that is not listening yet.
func NewServer(b Backend, log *slog.Logger) *Server {
	s := &Server{backend: b, log: log, changed: func(int) {}}
	s.http = http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    64 << 10,
		ConnContext:       withPeer,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	return s
}

// OnConns sets a function that is called with the number of open connections
// whenever it changes. It must be called before Serve, and f must not block.
func (s *Server) OnConns(f func(conns int)) { s.changed = f }

// Serve answers requests until ctx ends. It closes l, cancels the requests that
// run, and returns when all have ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// Streams end with this context: Shutdown and Close don't know of them.
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.http.BaseContext = func(net.Listener) context.Context { return base }
	stop := context.AfterFunc(ctx, func() {
		cancel()
		// Answers that are under way get a moment; nothing that runs for long
		// ignores its context.
		grace, done := context.WithTimeout(context.Background(), 5*time.Second)
		defer done()
		if s.http.Shutdown(grace) != nil {
			_ = s.http.Close()
		}
	})
	err := s.http.Serve(&countingListener{Listener: l, server: s})
	if !stop() {
		// Serve returns as soon as Shutdown begins; this waits for its end.
		_ = s.http.Shutdown(context.Background())
	}
	cancel()
	s.streams.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve API: %w", err)
}

// countingListener counts the connections that are open, hijacked ones too.
type countingListener struct {
	net.Listener
	server *Server
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.server.count(1)
	return &countedConn{Conn: c, server: l.server}, nil
}

func (s *Server) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns += n
	s.changed(s.conns)
}

type countedConn struct {
	net.Conn
	server *Server
	once   sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.server.count(-1) })
	return c.Conn.Close()
}

type peerKey struct{}

// withPeer asks the kernel who is at the other end of the connection.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if cc, ok := c.(*countedConn); ok {
		c = cc.Conn
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred.Uid)
}

// admitted says whether the peer may use this socket: the supervisor's own user
// and root, nobody else, also where the socket's directory was opened up.
func admitted(ctx context.Context) error {
	uid, ok := ctx.Value(peerKey{}).(uint32)
	if !ok {
		return &Error{Code: CodeInvalid, Message: "cannot tell who is calling"}
	}
	if own := uint32(os.Geteuid()); uid != own && uid != 0 {
		return &Error{Code: CodeInvalid, Message: fmt.Sprintf("this supervisor serves user %d and root, not user %d", own, uid)}
	}
	return nil
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h func(w http.ResponseWriter, r *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			err := admitted(r.Context())
			if err == nil {
				err = h(w, r)
			}
			if err != nil {
				s.fail(w, r, err)
			}
		})
	}
	handle("GET "+pathInfo, func(w http.ResponseWriter, r *http.Request) error {
		return answer(w, s.backend.Info(r.Context()), nil)
	})
	handle("GET "+pathVMs, func(w http.ResponseWriter, r *http.Request) error {
		vms := s.backend.List(r.Context())
		if vms == nil {
			vms = []VM{}
		}
		return answer(w, vmList{Version: SchemaVersion, VMs: vms}, nil)
	})
	handle("GET "+pathStats, func(w http.ResponseWriter, r *http.Request) error {
		st, err := s.backend.Stats(r.Context(), r.URL.Query().Get("vm"))
		return answer(w, st, err)
	})
	handle("GET "+pathMetrics, s.metrics)
	handle("POST "+pathVMs, func(w http.ResponseWriter, r *http.Request) error {
		var req RunRequest
		if err := decode(w, r, &req); err != nil {
			return err
		}
		vm, err := s.backend.Run(r.Context(), req)
		return answer(w, vm, err)
	})
	handle("POST "+pathSnapshots, func(w http.ResponseWriter, r *http.Request) error {
		var req SnapshotRequest
		if err := decode(w, r, &req); err != nil {
			return err
		}
		res, err := s.backend.Snapshot(r.Context(), req)
		return answer(w, res, err)
	})
	handle("POST "+pathClones, s.clone)

	vm := pathVMs + "/{name}"
	handle("GET "+vm, func(w http.ResponseWriter, r *http.Request) error {
		got, err := s.backend.Get(r.Context(), r.PathValue("name"))
		return answer(w, got, err)
	})
	handle("DELETE "+vm, func(w http.ResponseWriter, r *http.Request) error {
		force, err := boolParam(r, "force")
		if err != nil {
			return err
		}
		return s.backend.Remove(r.Context(), r.PathValue("name"), force)
	})
	handle("POST "+vm+"/stop", func(_ http.ResponseWriter, r *http.Request) error {
		timeout, err := time.ParseDuration(r.URL.Query().Get("timeout"))
		if err != nil || timeout < 0 {
			return invalid("bad timeout %q", r.URL.Query().Get("timeout"))
		}
		return s.backend.Stop(r.Context(), r.PathValue("name"), timeout)
	})
	handle("POST "+vm+"/kill", func(_ http.ResponseWriter, r *http.Request) error {
		return s.backend.Kill(r.Context(), r.PathValue("name"), r.URL.Query().Get("signal"))
	})
	handle("POST "+vm+"/pause", func(_ http.ResponseWriter, r *http.Request) error {
		return s.backend.Pause(r.Context(), r.PathValue("name"))
	})
	handle("POST "+vm+"/resume", func(_ http.ResponseWriter, r *http.Request) error {
		return s.backend.Resume(r.Context(), r.PathValue("name"))
	})
	handle("POST "+vm+"/wait", func(w http.ResponseWriter, r *http.Request) error {
		got, err := s.backend.Wait(r.Context(), r.PathValue("name"))
		return answer(w, got, err)
	})
	handle("GET "+vm+"/memory", func(w http.ResponseWriter, r *http.Request) error {
		got, err := s.backend.MemoryMap(r.Context(), r.PathValue("name"))
		return answer(w, got, err)
	})
	handle("POST "+vm+"/exec", s.exec)
	handle("POST "+vm+"/attach", s.attach)
	handle("GET "+vm+"/logs", s.logs)
	handle("PUT "+vm+"/files", func(_ http.ResponseWriter, r *http.Request) error {
		return s.backend.CopyIn(r.Context(), r.PathValue("name"), r.URL.Query().Get("path"), r.Body)
	})
	handle("GET "+vm+"/files", s.copyOut)
	handle("/", func(_ http.ResponseWriter, r *http.Request) error {
		return invalid("no such request: %s %s", r.Method, r.URL.Path)
	})
	return mux
}

func invalid(format string, args ...any) error {
	return &Error{Code: CodeInvalid, Message: fmt.Sprintf(format, args...)}
}

func boolParam(r *http.Request, name string) (bool, error) {
	v := r.URL.Query().Get(name)
	if v == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, invalid("bad %s %q", name, v)
	}
	return b, nil
}

// decode reads the request's whole body, so that the server notices when the
// client goes away.
func decode(w http.ResponseWriter, r *http.Request, v any) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return invalid("read request: %v", err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return invalid("decode request: %v", err)
	}
	return nil
}

func answer(w http.ResponseWriter, v any, err error) error {
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // fails only when the client left
	return nil
}

func toError(err error) *Error {
	if e := (*Error)(nil); errors.As(err, &e) {
		return e
	}
	return &Error{Code: CodeInternal, Message: err.Error()}
}

func status(c Code) int {
	switch c {
	case CodeNotFound:
		return http.StatusNotFound
	case CodeConflict, CodeState:
		return http.StatusConflict
	case CodeInvalid:
		return http.StatusBadRequest
	case CodeUnavailable:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := toError(err)
	if r.Context().Err() == nil {
		s.log.Info("request failed", "method", r.Method, "path", r.URL.Path, "code", e.Code, "error", e.Message)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status(e.Code))
	_ = json.NewEncoder(w).Encode(e)
}
