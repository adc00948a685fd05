//go:build linux

package pageserver

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// The control protocol: a line of JSON each way, any number of times. A server
// is not idle as long as somebody is connected.
type (
	controlRequest struct {
		// Op is "stats" or "shutdown".
		Op string `json:"op"`
		// Force shuts down although clones run, which stop at their next fault then.
		Force bool `json:"force,omitempty"`
	}
	controlResponse struct {
		Error string `json:"error,omitempty"`
		Stats *Stats `json:"stats,omitempty"`
	}
)

// maxControlLine bounds a question. An answer has some 200 bytes for each session.
const maxControlLine = 4096

// serveControl answers one connection to the control socket.
func (s *Server) serveControl(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	if _, err := credentials(conn, nil); err != nil {
		s.config.Log.Warn("control connection refused", "error", err)
		return
	}
	s.mu.Lock()
	s.controls++
	s.rearm()
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.controls--
		s.rearm()
		s.mu.Unlock()
	}()
	stopped := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopped()

	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 256), maxControlLine)
	for lines.Scan() {
		response, shutdown := s.control(lines.Bytes())
		line, err := json.Marshal(response)
		if err != nil {
			return
		}
		// Who does not read its answers does not hold us up.
		_ = conn.SetWriteDeadline(time.Now().Add(handshakeTimeout))
		if _, err := conn.Write(append(line, '\n')); err != nil {
			return
		}
		if shutdown {
			s.stop(errShutdown)
			return
		}
	}
}

// control answers one question.
func (s *Server) control(line []byte) (_ controlResponse, shutdown bool) {
	var q controlRequest
	if err := json.Unmarshal(line, &q); err != nil {
		return controlResponse{Error: fmt.Sprintf("parse request: %v", err)}, false
	}
	switch q.Op {
	case "stats":
		st := s.Stats()
		return controlResponse{Stats: &st}, false
	case "shutdown":
		s.mu.Lock()
		n := len(s.sessions)
		s.mu.Unlock()
		if n > 0 && !q.Force {
			return controlResponse{Error: fmt.Sprintf("%d VMs are being served", n)}, false
		}
		return controlResponse{}, true
	default:
		return controlResponse{Error: fmt.Sprintf("unknown op %q, want stats or shutdown", q.Op)}, false
	}
}

// errAnswered is an answer, and leaves the connection in order.
var errAnswered = errors.New("it answers:")

// controlClient asks a page server. Its methods may be called concurrently.
type controlClient struct {
	// mu is held from a question to its answer.
	mu   sync.Mutex
	conn *net.UnixConn
	in   *bufio.Reader
}

func dialControl(ctx context.Context, socket string) (*controlClient, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to page server: %w", err)
	}
	u := conn.(*net.UnixConn)
	return &controlClient{conn: u, in: bufio.NewReader(u)}, nil
}

func (c *controlClient) ask(ctx context.Context, q controlRequest) (controlResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// An answer that came too late would be taken for the next one: a failed
	// exchange ends the connection.
	unblock := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	var r controlResponse
	err := ctx.Err()
	if err == nil {
		err = c.exchange(q, &r)
	}
	if !unblock() || err != nil {
		c.conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return controlResponse{}, fmt.Errorf("ask page server for %s: %w", q.Op, err)
	}
	if r.Error != "" {
		return controlResponse{}, fmt.Errorf("ask page server for %s: %w %s", q.Op, errAnswered, r.Error)
	}
	return r, nil
}

func (c *controlClient) exchange(q controlRequest, r *controlResponse) error {
	line, err := json.Marshal(q)
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		return err
	}
	line, err = c.in.ReadBytes('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, r)
}

func (c *controlClient) close() { c.conn.Close() }
