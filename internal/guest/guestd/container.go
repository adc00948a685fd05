package guestd

import (
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"fcvm/internal/guest/proto"
)

// lingerTime is how long a client that does not read may hold up the end of the
// VM, once the container has ended.
const lingerTime = 10 * time.Second

// container is the container's process and who listens to it.
type container struct {
	*process
	server    *Server
	stdinOnce bool

	mu      sync.Mutex
	clients []*attached // guarded by mu
	over    bool        // guarded by mu: no more clients
	code    int         // guarded by mu, valid when over

	recorded sync.Once // the end
	logMu    sync.Mutex
	logBuf   []byte // guarded by logMu
}

// attached is a client of the container's streams.
type attached struct {
	conn net.Conn
	out  *proto.FrameWriter
}

func (s *Server) start(spec proto.ContainerSpec) error {
	if len(spec.Args) == 0 {
		return errors.New("the container has no command")
	}
	s.mu.Lock()
	if s.container != nil || s.starting {
		s.mu.Unlock()
		return errors.New("the container's process was already started")
	}
	s.starting = true
	size := s.size
	s.mu.Unlock()
	if size.rows == 0 {
		size = winsize{spec.Rows, spec.Cols}
	}

	err := s.prepare(spec)
	var p *process
	if err == nil {
		p, err = start(s.cfg.Children, command{
			args: spec.Args, env: spec.Env, dir: spec.WorkDir, makeDir: true, user: spec.User,
			tty: spec.TTY, stdin: spec.OpenStdin, size: size, etc: s.cfg.Etc, hostname: s.host(),
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.starting = false
	if err != nil {
		return err
	}
	c := &container{process: p, server: s, stdinOnce: spec.StdinOnce, clients: s.waiting}
	s.waiting = nil
	s.container = c
	s.spec = &spec
	go c.run() // ends with the process; Exited tells
	return nil
}

func (s *Server) host() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hostname
}

// run passes the output on until the process has ended and the end is told.
func (c *container) run() {
	out := c.pump(func(b []byte) { c.output(proto.Stdout, b) }, func(b []byte) { c.output(proto.Stderr, b) })
	code := c.wait()
	// As the end of a container's first process ends all others in its pid
	// namespace.
	c.server.cfg.System.KillAll()
	told := make(chan struct{})
	go func() { // ends with the VM at the latest
		defer close(told)
		out.drain()
		c.end(code)
	}()
	slow := time.NewTimer(lingerTime)
	defer slow.Stop()
	select {
	case <-told:
	case <-slow.C:
		c.recordEnd(code)
	}
	close(c.server.exited)
}

// end records the end and tells it to who is attached.
func (c *container) end(code int) {
	c.recordEnd(code)
	c.mu.Lock()
	c.over, c.code = true, code
	clients := slices.Clone(c.clients)
	c.mu.Unlock()
	for _, a := range clients {
		_ = a.out.Exit(code) // who is gone needs no answer
	}
}

func (c *container) recordEnd(code int) {
	c.recorded.Do(func() { c.log(proto.LogRecord{Stream: proto.Exit, ExitCode: code}) })
}

// output records b and sends it to who is attached. A client that is slow makes
// the process wait; one that is gone does not.
func (c *container) output(stream proto.Stream, b []byte) {
	c.log(proto.LogRecord{Stream: stream, Data: b})
	t := proto.FrameStdout
	if stream == proto.Stderr {
		t = proto.FrameStderr
	}
	c.mu.Lock()
	clients := slices.Clone(c.clients)
	c.mu.Unlock()
	for _, a := range clients {
		if a.out.Write(t, b) != nil {
			c.detach(a)
		}
	}
}

func (c *container) log(r proto.LogRecord) {
	c.logMu.Lock()
	defer c.logMu.Unlock()
	r.Time = time.Now()
	c.logBuf = proto.AppendLogRecord(c.logBuf[:0], r)
	// A log that cannot be written must not stop the container.
	_, _ = c.server.cfg.Log.Write(c.logBuf)
}

func (c *container) detach(a *attached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clients = slices.DeleteFunc(c.clients, func(x *attached) bool { return x == a })
}

// attach joins a client, before or after the container's start.
func (s *Server) attach(conn net.Conn, req proto.AttachRequest) error {
	a := &attached{conn: conn, out: proto.NewFrameWriter(conn)}
	size := winsize{req.Rows, req.Cols}
	c, err := s.await(a, size)
	if err != nil {
		return err
	}
	if c != nil {
		c.resize(size)
		if code, over, err := c.join(a); err != nil || over {
			if err == nil {
				err = a.out.Exit(code)
			}
			return err
		}
	}
	s.serveAttached(a, req.Stdin)
	s.leave(a, req.Stdin)
	return nil
}

// await joins a client that comes before the start; afterwards it returns the
// container to join. Ready is written under the lock, so that it is the first frame
// and nothing that comes after it is missed.
func (s *Server) await(a *attached, size winsize) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.container != nil {
		return s.container, nil
	}
	if err := a.out.Write(proto.FrameReady, nil); err != nil {
		return nil, err
	}
	s.waiting = append(s.waiting, a)
	if size.rows > 0 && size.cols > 0 {
		s.size = size
	}
	return nil, nil
}

func (c *container) join(a *attached) (code int, over bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := a.out.Write(proto.FrameReady, nil); err != nil {
		return 0, false, err
	}
	if !c.over {
		c.clients = append(c.clients, a)
	}
	return c.code, c.over, nil
}

// serveAttached passes the client's frames on. It returns when the client is
// gone.
func (s *Server) serveAttached(a *attached, stdin bool) {
	buf := make([]byte, proto.MaxPayload)
	for {
		f, err := proto.ReadFrame(a.conn, buf)
		if err != nil {
			return
		}
		s.mu.Lock()
		c := s.container
		if rows, cols, err := f.Size(); err == nil && c == nil {
			s.size = winsize{rows, cols}
		}
		s.mu.Unlock()
		if c == nil {
			continue // what is typed before the start is lost, as there is no process
		}
		if f.Type == proto.FrameStdinEOF && !c.stdinOnce {
			continue // others may attach and type
		}
		c.frame(f, stdin)
	}
}

// leave forgets a client that is gone.
func (s *Server) leave(a *attached, stdin bool) {
	s.mu.Lock()
	s.waiting = slices.DeleteFunc(s.waiting, func(x *attached) bool { return x == a })
	c := s.container
	s.mu.Unlock()
	if c == nil {
		return
	}
	c.detach(a)
	if stdin && c.stdinOnce {
		c.closeStdin()
	}
}
