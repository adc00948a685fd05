// Package agent is the host's side of the connection to a guest's agent.
//
// A [Client] owns one byte stream to the guest (a virtio-serial port, a vsock)
// and multiplexes requests over it. What the guest sends is hostile input: it can
// end the connection, and never more than that.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"fcvm/internal/guest/link"
	"fcvm/internal/guest/proto"
)

// Error is an error that the agent reported: Code is 125 for its own errors,
// 126 when a command cannot be executed, 127 when it is not found.
type Error = proto.Error

// ErrClosed is wrapped by the errors of requests whose connection ended, be it
// that the guest ended or that it broke the protocol.
var ErrClosed = errors.New("connection to the guest's agent ended")

// Client talks to the agent of one guest. Its methods may be called
// concurrently.
type Client struct {
	greeting chan struct{} // held (one token) by who uses pending
	pending  *link.Pending // guarded by greeting; nil once link is there

	mu     sync.Mutex
	link   *link.Host // guarded by mu; nil until the first request
	err    error      // guarded by mu: why there never was a link
	closed bool       // guarded by mu
	failed chan struct{}
}

// New takes conn over, and sends nothing yet: the first request greets the agent,
// which costs a guest under TCG as much time as it takes to give it an identity.
func New(conn net.Conn) *Client {
	return &Client{greeting: make(chan struct{}, 1), pending: link.NewPending(conn), failed: make(chan struct{})}
}

// Connect greets the agent on conn until it answers or ctx ends, and takes conn
// over in either case. What an earlier connection left in the stream is skipped.
// All streams of earlier connections end in the guest.
func Connect(ctx context.Context, conn net.Conn) (*Client, error) {
	c := New(conn)
	if _, err := c.session(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Identify gives a clone its identity, and returns when it is in force. It comes
// before any other request. The error wraps an *[Error] when the guest refused it, and
// [ErrClosed] when the connection ended; after any error the client is of no more use.
func (c *Client) Identify(ctx context.Context, id proto.Identity) error {
	b, err := id.AppendBinary(nil)
	if err != nil {
		return err
	}
	select {
	case c.greeting <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-c.greeting }()
	if c.pending == nil {
		return errors.New("identify the guest: it comes before any other request")
	}
	err = c.pending.Identify(ctx, b)
	if err == nil {
		return nil
	}
	if ctx.Err() == nil && !errors.As(err, new(*Error)) {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return c.giveUp(fmt.Errorf("agent: %w", err))
}

// session returns the one that requests go through, and begins it when there is none.
func (c *Client) session(ctx context.Context) (*link.Host, error) {
	select {
	case c.greeting <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-c.greeting }()
	c.mu.Lock()
	l, err := c.link, c.err
	c.mu.Unlock()
	if l != nil || err != nil {
		return l, err
	}
	l, err = c.pending.Session(ctx)
	c.pending = nil
	if err != nil {
		return nil, c.giveUp(fmt.Errorf("connect to the guest's agent: %w", err))
	}
	c.mu.Lock()
	c.link = l
	closed := c.closed
	c.mu.Unlock()
	if closed {
		l.Close()
		return nil, fmt.Errorf("connect to the guest's agent: %w", net.ErrClosed)
	}
	return l, nil
}

// giveUp notes why there will be no session. The caller holds greeting.
func (c *Client) giveUp(err error) error {
	c.pending = nil
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.failed)
	}
	return err
}

// Done is closed when the connection has ended. Before the first request nothing
// tells of that.
func (c *Client) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		return c.link.Done()
	}
	return c.failed
}

// Err says why the connection ended, once [Client.Done] is closed.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		return c.link.Err()
	}
	return c.err
}

// Close ends the connection. The guest runs on. It is idempotent, and waits for a
// greeting that is under way: end that by its context.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.greeting <- struct{}{}
	defer func() { <-c.greeting }()
	if c.pending != nil {
		err := c.pending.Close()
		_ = c.giveUp(net.ErrClosed)
		return err
	}
	if c.link != nil {
		return c.link.Close()
	}
	return nil
}

// Quiesce stops the traffic of this connection at a frame's end in both
// directions, so that a snapshot taken now holds no half frame; requests and
// streams wait until [Client.Unquiesce].
func (c *Client) Quiesce(ctx context.Context) error {
	l, err := c.session(ctx)
	if err != nil {
		return err
	}
	return l.Quiesce(ctx)
}

// Unquiesce lets the traffic go on.
func (c *Client) Unquiesce(ctx context.Context) error {
	l, err := c.session(ctx)
	if err != nil {
		return err
	}
	return l.Resume(ctx)
}

// Info asks the agent about itself.
func (c *Client) Info(ctx context.Context) (proto.Info, error) {
	var info proto.Info
	err := c.call(ctx, proto.Request{Method: proto.MethodInfo}, &info)
	return info, err
}

// Start starts the container's process; a guest has one, once. The error is an
// *[Error] when the guest could not start it.
func (c *Client) Start(ctx context.Context, spec proto.ContainerSpec) error {
	return c.call(ctx, proto.Request{Method: proto.MethodStart, Start: &spec}, &proto.Empty{})
}

// SetClock sets the guest's wall clock. It is behind by as long as the request took to
// arrive, which is at most until SetClock returns.
func (c *Client) SetClock(ctx context.Context, now time.Time) error {
	return c.call(ctx, proto.Request{Method: proto.MethodClock, Wall: now}, &proto.Empty{})
}

// Signal sends a signal, named as "TERM", "SIGTERM" or "15", to the container's
// process.
func (c *Client) Signal(ctx context.Context, name string) error {
	return c.call(ctx, proto.Request{Method: proto.MethodSignal, Signal: name}, &proto.Empty{})
}

// Exec starts a process. The stream carries frames of package proto, without
// FrameReady; the caller closes it, upon which the process's stdin ends and its
// output is discarded. The error is an *[Error] when the guest could not start it.
func (c *Client) Exec(ctx context.Context, req proto.ExecRequest) (io.ReadWriteCloser, error) {
	return c.stream(ctx, proto.Request{Method: proto.MethodExec, Exec: &req})
}

// Attach joins the streams of the container's process, as [Client.Exec] does for
// its own. The output from here on is sent; a slow reader makes the process wait.
// The last frame is FrameExit. Attach may be called before Start.
func (c *Client) Attach(ctx context.Context, req proto.AttachRequest) (io.ReadWriteCloser, error) {
	return c.stream(ctx, proto.Request{Method: proto.MethodAttach, Attach: &req})
}

// CopyIn unpacks a tar stream of one file or directory at path, as docker cp
// does: into path when that is a directory, else under path's own name. The
// error is an *[Error] when the guest could not store it.
func (c *Client) CopyIn(ctx context.Context, path string, tar io.Reader) error {
	s, err := c.open(ctx, proto.Request{Method: proto.MethodCopyIn, Path: path})
	if err != nil {
		return err
	}
	defer s.Close()
	stop := closeOn(ctx, s)
	defer stop()

	// The guest may answer with an error before it has read everything.
	answer := make(chan error, 1)
	go func() { answer <- proto.ReadMessage(s, &proto.Empty{}) }()
	var local *readError
	if errors.As(sendTar(s, tar), &local) {
		s.Close() // the guest must not take half of it for the whole
	}
	said := <-answer
	switch {
	case local != nil:
		return fmt.Errorf("copy to %s: %w", path, local.err)
	case said != nil:
		return c.explain(ctx, "copy to "+path, said)
	}
	return nil
}

// CopyOut returns a tar stream of the file or directory at path, whose entries
// begin with path's last part. A symbolic link is sent as a link. An error of the
// guest in the middle is returned by Read as an *[Error]. The tar stream is the
// guest's: unpack it as hostile input.
func (c *Client) CopyOut(ctx context.Context, path string) (io.ReadCloser, error) {
	s, err := c.open(ctx, proto.Request{Method: proto.MethodCopyOut, Path: path})
	if err != nil {
		return nil, err
	}
	stop := closeOn(ctx, s)
	var info proto.FileInfo
	if err := proto.ReadMessage(s, &info); err != nil {
		stop()
		s.Close()
		return nil, c.explain(ctx, "copy from "+path, err)
	}
	return &tarReader{s: s, stop: stop, info: info}, nil
}

func (c *Client) call(ctx context.Context, req proto.Request, answer any) error {
	s, err := c.open(ctx, req)
	if err != nil {
		return err
	}
	defer s.Close()
	stop := closeOn(ctx, s)
	defer stop()
	if err := proto.ReadMessage(s, answer); err != nil {
		return c.explain(ctx, string(req.Method), err)
	}
	return nil
}

func (c *Client) stream(ctx context.Context, req proto.Request) (io.ReadWriteCloser, error) {
	s, err := c.open(ctx, req)
	if err != nil {
		return nil, err
	}
	stop := closeOn(ctx, s)
	f, err := proto.ReadFrame(s, nil)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil && f.Type == proto.FrameError {
		err = f.Err()
	} else if err == nil && f.Type != proto.FrameReady {
		err = proto.ErrMalformed
	}
	if err != nil {
		s.Close()
		return nil, c.explain(ctx, string(req.Method), err)
	}
	return s, nil
}

func (c *Client) open(ctx context.Context, req proto.Request) (net.Conn, error) {
	l, err := c.session(ctx)
	if err != nil {
		return nil, err
	}
	s, err := l.Open(ctx, func(w io.Writer) error { return proto.WriteMessage(w, req) })
	if err != nil {
		return nil, c.explain(ctx, string(req.Method), err)
	}
	return s, nil
}

// explain puts the cause that helps most into an error: the caller's own
// context, then what the agent said, then why the connection ended.
func (c *Client) explain(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("agent: %s: %w", what, context.Cause(ctx))
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	select {
	case <-c.Done():
		return fmt.Errorf("agent: %s: %w: %w", what, ErrClosed, c.Err())
	default:
		return fmt.Errorf("agent: %s: %w", what, err)
	}
}

// closeOn closes s when ctx ends. The returned function ends that, and tells
// whether it came in time.
func closeOn(ctx context.Context, s net.Conn) func() bool {
	done := make(chan struct{})
	var once sync.Once
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		s.Close()
	})
	return func() bool {
		inTime := true
		once.Do(func() {
			if inTime = stop(); !inTime {
				<-done
			}
		})
		return inTime
	}
}
