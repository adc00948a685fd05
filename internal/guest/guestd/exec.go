package guestd

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"fcvm/internal/guest/proto"
)

// exec runs a process beside the container's. When the client goes away the
// process stays, its stdin ends, and its output is read and dropped.
func (s *Server) exec(conn net.Conn, req proto.ExecRequest) error {
	if len(req.Args) == 0 {
		return errors.New("there is no command to execute")
	}
	p, err := start(s.cfg.Children, s.execCommand(req))
	if err != nil {
		return err
	}
	out := proto.NewFrameWriter(conn)
	var gone atomic.Bool
	send := func(t proto.FrameType) func([]byte) {
		return func(b []byte) {
			if !gone.Load() && out.Write(t, b) != nil {
				gone.Store(true)
			}
		}
	}
	if out.Write(proto.FrameReady, nil) != nil {
		gone.Store(true)
	}
	var client sync.WaitGroup
	client.Go(func() {
		buf := make([]byte, proto.MaxPayload)
		for {
			f, err := proto.ReadFrame(conn, buf)
			if err != nil {
				break
			}
			p.frame(f, req.Stdin || req.TTY)
		}
		gone.Store(true)
		conn.Close() // lets go of a blocked write
		p.closeStdin()
	})
	streams := p.pump(send(proto.FrameStdout), send(proto.FrameStderr))
	code := p.wait()
	streams.drain()
	if !gone.Load() {
		_ = out.Exit(code) // who is gone needs no answer
	}
	conn.Close()
	// A process that was left in the background may hold the streams: it must not
	// die of writing to them.
	streams.wait()
	p.closeStreams()
	client.Wait()
	return nil
}

func (s *Server) execCommand(req proto.ExecRequest) command {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := command{
		args: req.Args, env: req.Env, dir: req.WorkDir, user: req.User, tty: req.TTY,
		stdin: req.Stdin, size: winsize{req.Rows, req.Cols}, etc: s.cfg.Etc, hostname: s.hostname,
	}
	if s.spec != nil {
		c.env = append(append([]string(nil), s.spec.Env...), req.Env...)
		if c.dir == "" {
			c.dir, c.makeDir = s.spec.WorkDir, true
		}
		if c.user == "" {
			c.user = s.spec.User
		}
	}
	return c
}
