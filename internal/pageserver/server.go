//go:build linux

package pageserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"fcvm/internal/workingset"
)

const (
	// answerTimeout bounds how long who asked may take to read the answer.
	answerTimeout = 5 * time.Second
	// keptFailures are remembered for stats.
	keptFailures = 64
)

// ReadyLine is what uffd_handler writes to --ready-fd once it listens.
const ReadyLine = "ready\n"

// Config of a [Server].
type Config struct {
	// MemFile is the path of the snapshot's memory file, whole pages.
	MemFile string
	// PageSums is the path of the sums of its pages (package pagesum); empty
	// where there are none, and then what changed underneath is not noticed.
	PageSums string
	// WorkingSet is the path of the snapshot's working set, which is replayed and
	// recorded to; empty for neither. ID is the snapshot's, which the set has to have.
	WorkingSet string
	ID         workingset.ID
	Policy     Policy
	// Template is shared memory (a memfd, a file on tmpfs), open for writing; for
	// [PolicyShare]. The caller closes it, after [Server.Close]. It is empty, unless
	// TemplateUsed says that a predecessor filled it.
	Template     *os.File
	TemplateUsed bool
	// Workers is how many faults are answered at a time; 0 means GOMAXPROCS. One of
	// them waits in a system call, for which GOMAXPROCS should be larger by one or more: when
	// no P is idle, the runtime takes the P of who waits every 20 µs, at
	// three times the processor time for a fault (measured with two that waited).
	Workers int
	// Fill is how the template is filled in the background.
	Fill Fill
	// AllowUIDs may connect, besides root and this process's user.
	AllowUIDs []int
	// IdleTimeout ends Serve when for so long there was neither a session nor a
	// control connection; 0 means never.
	IdleTimeout time.Duration
	Log         *slog.Logger
}

// Server answers the page faults of all clones of one snapshot.
type Server struct {
	config     Config
	source     *source
	template   *template // nil with PolicyCopy
	workingSet *workingSet
	buffers    [][]byte
	fillers    chan []byte // buffers of those who fill the template
	slow       slowQueue
	reception  Reception
	ahead      *ahead
	warned     sync.Once
	stop       context.CancelCauseFunc // of Serve; set before anything runs

	demand, replay, background histogram
	replayed, backgrounded     atomic.Int64
	lastDemand                 atomic.Uint64
	anySession                 atomic.Bool
	running                    sync.WaitGroup // sessions that no connection began

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

// New opens and checks all that the server needs. The caller closes the server.
func New(c Config) (_ *Server, err error) {
	s := &Server{config: c, sessions: make(map[*session]struct{})}
	s.slow.init()
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	if s.source, err = openSource(c.MemFile, c.PageSums); err != nil {
		return nil, err
	}
	switch c.Policy {
	case PolicyShare:
		if c.Template == nil {
			return nil, errors.New("policy share needs a template")
		}
		s.template, err = newTemplate(c.Template, s.source, c.TemplateUsed)
	case PolicyCopy:
	default:
		err = fmt.Errorf("unknown policy %q, want copy or share", c.Policy)
	}
	if err != nil {
		return nil, err
	}
	warn := func(msg string, err error) { c.Log.Warn(msg, "error", err) }
	if s.workingSet, err = openWorkingSet(c.WorkingSet, c.ID, s.source.size/pageSize, warn); err != nil {
		return nil, err
	}
	if s.buffers, err = newBuffers(1+slowReaders+fillers, window); err != nil {
		return nil, err
	}
	s.fillers = make(chan []byte, fillers)
	for _, buf := range s.buffers[1+slowReaders:] {
		s.fillers <- buf
	}
	s.ahead = newAhead(s, s.buffers[0])
	return s, nil
}

// Close gives up what New opened. It must follow Serve's end.
func (s *Server) Close() error {
	freeBuffers(s.buffers)
	if s.ahead != nil {
		s.ahead.close()
	}
	if s.workingSet != nil {
		s.workingSet.close()
	}
	if s.source != nil {
		return s.source.close()
	}
	return nil
}

// Serve accepts VMMs on handshakes, and questions on control; either may be nil. It
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
	workers := s.startWorkers(ctx)
	if handshakes != nil {
		accept(handshakes, s.serveVMM)
	}
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
	s.running.Wait()
	s.slow.close()
	workers.Wait()
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

// startWorkers starts who fills ahead, and those who answer faults that wait for the
// disk. They end after ctx, and after the slow queue was closed.
func (s *Server) startWorkers(ctx context.Context) *sync.WaitGroup {
	wg := &sync.WaitGroup{}
	wg.Go(func() { s.ahead.run(ctx) })
	for _, buf := range s.buffers[1 : 1+slowReaders] {
		wg.Go(func() { s.answerSlow(buf) })
	}
	return wg
}

// begin adds a session.
func (s *Server) begin(ses *session) {
	s.mu.Lock()
	s.sessions[ses] = struct{}{}
	makeRoom(len(s.sessions))
	s.rearm()
	s.mu.Unlock()
	s.beginRecording(ses)
	s.ahead.begin(ses)
	s.config.Log.Info("session begins", "pid", ses.vmm.pid, "regions", len(ses.regions))
}

// serve runs a session to its end.
func (s *Server) serve(ctx context.Context, ses *session) {
	ses.run(ctx)
	st := ses.stats()
	s.mu.Lock()
	delete(s.sessions, ses)
	s.ended++
	s.faults += st.Faults
	s.rearm()
	s.mu.Unlock()
	s.config.Log.Info("session ended", "pid", st.PID, "faults", st.Faults, "copied_bytes", st.CopiedBytes, "woken", st.Woken, "retries", st.Retries)
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
	st.ReplayedBytes, st.BackgroundBytes = s.replayed.Load(), s.backgrounded.Load()
	st.WorkingSetPages = s.workingSet.count()
	st.Demand, st.Replay, st.Background = s.demand.snapshot(), s.replay.snapshot(), s.background.snapshot()
	for _, ses := range sessions {
		one := ses.stats()
		st.Faults += one.Faults
		st.Sessions = append(st.Sessions, one)
	}
	slices.SortFunc(st.Sessions, func(a, b SessionStats) int { return a.PID - b.PID })
	return st
}
