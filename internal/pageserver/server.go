//go:build linux

package pageserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"fcvm/internal/uffd"
)

const (
	// handshakeTimeout bounds how long a VMM may take to say what it has.
	handshakeTimeout = 5 * time.Second
	// keptFailures are remembered for stats.
	keptFailures = 64
)

// Config of a [Server].
type Config struct {
	// MemFile is the path of the snapshot's memory file, whole pages.
	MemFile string
	Policy  Policy
	// Template is empty shared memory (a memfd, a file on tmpfs), open for
	// writing; for [PolicyShare]. The caller closes it, after [Server.Close].
	Template *os.File
	// AllowUIDs may connect, besides root and this process's user.
	AllowUIDs []int
	// IdleTimeout ends Serve when for so long there was neither a session nor a
	// control connection; 0 means never.
	IdleTimeout time.Duration
	Log         *slog.Logger
}

// Server answers the page faults of all clones of one snapshot.
type Server struct {
	config   Config
	source   *source
	template *template // nil with PolicyCopy
	buffers  *buffers
	warned   sync.Once
	stop     context.CancelCauseFunc // of Serve; set before anything runs

	// mu guards what follows.
	mu       sync.Mutex
	sessions map[*session]struct{}
	controls int
	ended    int
	faults   uint64 // of sessions that have ended
	refused  int
	failures []Failure
	idle     *time.Timer
}

// Reasons for which Serve ends.
var (
	errIdle     = errors.New("idle")
	errShutdown = errors.New("shutdown was asked for")
)

// New checks the memory file and the template. The caller closes the server.
func New(c Config) (*Server, error) {
	src, err := openSource(c.MemFile)
	if err != nil {
		return nil, err
	}
	s := &Server{config: c, source: src, sessions: make(map[*session]struct{})}
	switch c.Policy {
	case PolicyShare:
		if c.Template == nil {
			err = errors.New("policy share needs a template")
			break
		}
		s.template, err = newTemplate(c.Template, src)
	case PolicyCopy:
	default:
		err = fmt.Errorf("unknown policy %q, want copy or share", c.Policy)
	}
	if err == nil {
		s.buffers, err = newBuffers(window)
	}
	if err != nil {
		src.file.Close()
		return nil, err
	}
	return s, nil
}

// Close gives up the memory file. It must follow Serve's end.
func (s *Server) Close() error {
	s.buffers.close()
	return s.source.file.Close()
}

// Serve accepts VMMs on handshakes, and questions on control unless that is nil. It
// returns nil when ctx ends, when it was idle, or when it was told to shut down;
// sessions are over then, and listeners closed. It is called once.
func (s *Server) Serve(ctx context.Context, handshakes, control *net.UnixListener) error {
	ctx, s.stop = context.WithCancelCause(ctx)
	defer s.stop(nil)
	s.mu.Lock()
	s.rearm()
	s.mu.Unlock()

	var wg sync.WaitGroup
	accept := func(l *net.UnixListener, serve func(context.Context, *net.UnixConn)) {
		stopped := context.AfterFunc(ctx, func() { l.Close() })
		wg.Go(func() {
			defer stopped()
			for {
				conn, err := l.AcceptUnix()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					// Out of descriptors, say: no reason to leave the clones that run.
					s.config.Log.Warn("accepting a connection failed", "error", err)
					select {
					case <-ctx.Done():
					case <-time.After(100 * time.Millisecond):
					}
					continue
				}
				wg.Go(func() { serve(ctx, conn) })
			}
		})
	}
	accept(handshakes, s.serveVMM)
	if control != nil {
		accept(control, s.serveControl)
	}
	<-ctx.Done()
	s.mu.Lock()
	if n := len(s.sessions); n > 0 {
		// Each holds its userfaultfd, so that it reads nothing wrong.
		s.config.Log.Warn("VMMs are left without a page server, and stop at their next fault", "count", n)
	}
	s.mu.Unlock()
	wg.Wait()
	s.mu.Lock()
	if s.idle != nil {
		s.idle.Stop()
	}
	s.mu.Unlock()
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errIdle), errors.Is(cause, errShutdown):
		s.config.Log.Info("page server ends", "reason", cause)
		return nil
	case errors.Is(cause, context.Canceled), errors.Is(cause, context.DeadlineExceeded):
		return nil
	default:
		return cause
	}
}

// serveVMM serves one clone.
func (s *Server) serveVMM(ctx context.Context, conn *net.UnixConn) {
	session, err := s.admit(ctx, conn)
	if err != nil {
		s.mu.Lock()
		s.refused++
		s.mu.Unlock()
		s.config.Log.Warn("connection refused", "error", err)
		conn.Close()
		return
	}
	pid := session.vmm.pid
	s.config.Log.Info("session begins", "pid", pid, "regions", len(session.regions))
	session.run(ctx)
	st := session.snapshot()
	s.mu.Lock()
	delete(s.sessions, session)
	s.ended++
	s.faults += st.Faults
	s.rearm()
	s.mu.Unlock()
	s.config.Log.Info("session ended", "pid", pid, "faults", st.Faults, "copied_bytes", st.CopiedBytes, "woken", st.Woken)
}

// admit shakes hands.
func (s *Server) admit(ctx context.Context, conn *net.UnixConn) (_ *session, err error) {
	cred, err := credentials(conn, s.config.AllowUIDs)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return nil, err
	}
	unblock := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	h, err := receiveHandshake(conn)
	if err != nil {
		return nil, err
	}
	defer h.close()

	fd, err := uffd.FromFD(h.takeFD())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			fd.Close()
		}
	}()
	var vmm *process
	if len(h.fds) > 0 {
		vmm, err = newProcess(h.takeFD(), cred)
	} else {
		vmm, err = peerProcess(conn, cred)
	}
	if err != nil {
		return nil, err
	}
	regions, err := checkMappings(h.mappings, s.source.size)
	if err == nil && regions[0].PageSize != pageSize && s.template != nil {
		err = fmt.Errorf("check handshake: pages of %d bytes cannot be shared; use --policy copy", regions[0].PageSize)
	}
	if err != nil {
		// It handed its memory over and would wait for it for ever.
		s.fail(vmm, err)
		vmm.close()
		return nil, err
	}
	ses := &session{
		server: s, fd: fd, conn: conn, vmm: vmm, regions: regions, pageSize: regions[0].PageSize,
		over:  make(chan struct{}),
		stats: SessionStats{PID: vmm.pid, Started: time.Now()},
	}
	ses.work.L = &ses.mu
	s.mu.Lock()
	s.sessions[ses] = struct{}{}
	s.rearm()
	s.mu.Unlock()
	return ses, nil
}

// fail kills a VMM that cannot get its memory, and remembers why.
func (s *Server) fail(vmm *process, reason error) {
	if err := vmm.kill(); err != nil {
		reason = fmt.Errorf("%w; and it could not be killed: %w", reason, err)
	}
	s.config.Log.Error("VMM killed, its memory cannot be served", "pid", vmm.pid, "error", reason)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.failures) == keptFailures {
		s.failures = s.failures[1:]
	}
	s.failures = append(s.failures, Failure{PID: vmm.pid, Time: time.Now(), Reason: reason.Error()})
}

func (s *Server) warnOnce(msg string, err error) {
	s.warned.Do(func() { s.config.Log.Warn(msg, "error", err) })
}

// rearm starts the idle timer when nobody is here, and stops it when somebody is.
// The caller holds mu.
func (s *Server) rearm() {
	if s.config.IdleTimeout <= 0 {
		return
	}
	if s.idle != nil {
		s.idle.Stop()
		s.idle = nil
	}
	if len(s.sessions)+s.controls > 0 {
		return
	}
	s.idle = time.AfterFunc(s.config.IdleTimeout, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.sessions)+s.controls == 0 {
			s.stop(errIdle)
		}
	})
}

// Stats tells what the server did so far. It may be called at any time.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	st := Stats{
		PID: os.Getpid(), Policy: s.config.Policy, MemFile: s.config.MemFile, MemBytes: s.source.size,
		Sessions: []SessionStats{}, Ended: s.ended, Faults: s.faults, Refused: s.refused,
		Failures: append([]Failure(nil), s.failures...),
	}
	sessions := make([]*session, 0, len(s.sessions))
	for ses := range s.sessions {
		sessions = append(sessions, ses)
	}
	s.mu.Unlock()
	if s.template != nil {
		st.TemplateBytes = s.template.bytes.Load()
	}
	for _, ses := range sessions {
		one := ses.snapshot()
		st.Faults += one.Faults
		st.Sessions = append(st.Sessions, one)
	}
	return st
}
