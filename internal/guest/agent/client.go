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
	link *link.Host
}

// Connect greets the agent on conn until it answers or ctx ends, and takes conn
// over in either case. What an earlier connection left in the stream is skipped.
// All streams of earlier connections end in the guest.
func Connect(ctx context.Context, conn net.Conn) (*Client, error) {
	l, err := link.Dial(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("connect to the guest's agent: %w", err)
	}
	return &Client{link: l}, nil
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.link.Done() }

// Err says why the connection ended, once [Client.Done] is closed.
func (c *Client) Err() error { return c.link.Err() }

// Close ends the connection. The guest runs on. It is idempotent.
func (c *Client) Close() error { return c.link.Close() }

// Quiesce stops the traffic of this connection at a frame's end in both
// directions, so that a snapshot taken now holds no half frame; requests and
// streams wait until [Client.Unquiesce].
func (c *Client) Quiesce(ctx context.Context) error { return c.link.Quiesce(ctx) }

// Unquiesce lets the traffic go on.
func (c *Client) Unquiesce(ctx context.Context) error { return c.link.Resume(ctx) }

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

// Identify gives the guest a new identity, and returns when it is in force.
func (c *Client) Identify(ctx context.Context, id proto.Identity) error {
	return c.call(ctx, proto.Request{Method: proto.MethodIdentify, Identify: &id}, &proto.Empty{})
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
	sent := sendTar(s, tar)
	if sent != nil {
		var local *readError
		if errors.As(sent, &local) {
			s.Close()
			<-answer
			return fmt.Errorf("copy to %s: %w", path, local.err)
		}
	}
	if err := <-answer; err != nil {
		return c.explain(ctx, "copy to "+path, err)
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
	s, err := c.link.Open(ctx, func(w io.Writer) error { return proto.WriteMessage(w, req) })
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
	case <-c.link.Done():
		return fmt.Errorf("agent: %s: %w: %w", what, ErrClosed, c.link.Err())
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
