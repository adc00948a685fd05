// Package guestd is the agent that runs in the guest: it starts the container's
// process and others, passes their streams on, copies files, and gives a clone its
// identity.
//
// It has no goroutine that wakes by itself: an idle guest uses no CPU and dirties
// no page, which every clone would pay for.
package guestd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/proto"
)

// System is what the agent does to the machine that it runs on.
type System interface {
	SetHostname(name string) error
	SetClock(t time.Time) error
	// AddEntropy mixes seed into the kernel's random number generator, and makes
	// that use it at once.
	AddEntropy(seed []byte) error
	// KillAll kills all other processes.
	KillAll()
}

// Children starts processes and reaps them.
type Children interface {
	// Start calls start, which forks a process and returns its pid. The channel
	// gets the process's status once it has ended.
	Start(start func() (pid int, err error)) (int, <-chan syscall.WaitStatus, error)
}

// Config of a [Server].
type Config struct {
	System   System
	Children Children
	// Etc is the directory of passwd, group, hosts, hostname, resolv.conf and
	// machine-id.
	Etc string
	// Log is written whole records of package proto. A Write must not block for
	// ever.
	Log io.Writer
	// Address of this machine for /etc/hosts, or empty; Nameserver for
	// /etc/resolv.conf when a container brings none.
	Address, Nameserver string
	// Version of fcvm, for [proto.Info].
	Version string
}

// Server answers requests of the host.
type Server struct {
	cfg Config

	mu        sync.Mutex
	container *container           // guarded by mu; nil until Start
	spec      *proto.ContainerSpec // guarded by mu; nil until Start
	starting  bool                 // guarded by mu
	waiting   []*attached          // guarded by mu; attached before Start
	size      winsize              // guarded by mu; from attached clients, before Start
	hostname  string               // guarded by mu
	exited    chan struct{}        // see Exited

	// Between BeforeSnapshot and AfterSnapshot; the link's goroutine's alone.
	files    *cloneFiles
	filesErr error
}

// New returns a Server.
func New(c Config) *Server {
	host, err := os.Hostname()
	if err != nil || !validHostname(host) { // a kernel that was never told says "(none)"
		host = "localhost"
	}
	return &Server{cfg: c, hostname: host, exited: make(chan struct{})}
}

// Exited is closed when the container's process has ended, its end is in the log,
// and all attached clients were sent it.
func (s *Server) Exited() <-chan struct{} { return s.exited }

// Handle answers one stream of the host and closes it.
func (s *Server) Handle(conn net.Conn) {
	defer conn.Close()
	var req proto.Request
	if err := proto.ReadMessage(conn, &req); err != nil {
		_ = proto.NewFrameWriter(conn).Fail(failure(125, err)) // the host may be gone
		return
	}
	if err := s.dispatch(conn, req); err != nil {
		_ = proto.NewFrameWriter(conn).Fail(asError(err)) // the host may be gone
	}
}

func (s *Server) dispatch(conn net.Conn, req proto.Request) error {
	switch {
	case req.Method == proto.MethodInfo:
		return proto.WriteMessage(conn, s.info())
	case req.Method == proto.MethodStart && req.Start != nil:
		return answer(conn, s.start(*req.Start))
	case req.Method == proto.MethodSignal:
		return answer(conn, s.signal(req.Signal))
	case req.Method == proto.MethodClock && !req.Wall.IsZero():
		return answer(conn, s.cfg.System.SetClock(req.Wall))
	case req.Method == proto.MethodExec && req.Exec != nil:
		return s.exec(conn, *req.Exec)
	case req.Method == proto.MethodAttach && req.Attach != nil:
		return s.attach(conn, *req.Attach)
	case req.Method == proto.MethodCopyIn:
		return answer(conn, copyIn(conn, req.Path))
	case req.Method == proto.MethodCopyOut:
		return copyOut(conn, req.Path)
	}
	return fmt.Errorf("the agent does not know the request %q", req.Method)
}

func answer(conn net.Conn, err error) error {
	if err != nil {
		return err
	}
	return proto.WriteMessage(conn, proto.Empty{})
}

func failure(code int, err error) *proto.Error {
	return &proto.Error{Code: code, Message: err.Error()}
}

func asError(err error) *proto.Error {
	var e *proto.Error
	if errors.As(err, &e) {
		return e
	}
	return failure(125, err)
}

func (s *Server) info() proto.Info {
	i := proto.Info{AgentVersion: s.cfg.Version}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		i.BootID = strings.TrimSpace(string(b))
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		i.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) == nil {
		i.Uptime = time.Duration(ts.Nano())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i.Hostname = s.hostname
	if s.container != nil {
		i.ContainerStarted = true
		i.ContainerPID = s.container.pid
		i.ContainerRunning = s.container.alive()
	}
	return i
}

func (s *Server) signal(name string) error {
	s.mu.Lock()
	c := s.container
	s.mu.Unlock()
	if c == nil {
		return errors.New("the container's process has not been started")
	}
	return c.signal(name)
}

func (s *Server) etc(name string) string { return filepath.Join(s.cfg.Etc, name) }
