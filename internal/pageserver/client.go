//go:build linux

package pageserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrAnswered is a page server's refusal: it runs, and answers.
var ErrAnswered = errors.New("it answers:")

// Client asks a page server over its control socket. Its methods may be called
// concurrently.
type Client struct {
	socket string
	// mu is held from a question to its answer.
	mu sync.Mutex
	// conn is replaced after an exchange that failed, as an answer that came too
	// late would be taken for the next one. It is nil after Close.
	conn *net.UnixConn
	in   lineReader
	// broken tells that conn is to be replaced.
	broken bool
}

// Dial connects to a control socket. As long as somebody is connected, a page
// server is not idle.
func Dial(ctx context.Context, socket string) (*Client, error) {
	c := &Client{socket: socket}
	return c, c.dial(ctx)
}

func (c *Client) dial(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return fmt.Errorf("connect to page server: %w", err)
	}
	c.conn = conn.(*net.UnixConn)
	c.in = lineReader{conn: c.conn}
	c.broken = false
	return nil
}

// Close ends the connection, after the question that is under way. It is
// idempotent. Questions fail after it.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// Stats asks what the page server did.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	r, _, err := c.ask(ctx, controlRequest{Op: "stats"}, nil)
	if err != nil {
		return Stats{}, err
	}
	if r.Stats == nil {
		return Stats{}, errors.New("ask page server for stats: it sent none")
	}
	return *r.Stats, nil
}

// Shutdown ends the page server. Guests wait at their next fault until another
// one serves them.
func (c *Client) Shutdown(ctx context.Context) error {
	_, _, err := c.ask(ctx, controlRequest{Op: "shutdown", Force: true}, nil)
	return err
}

// Serve hands a guest to the page server, which duplicates the descriptors. One
// that it serves already is no error. After that, the guest counts as served.
func (c *Client) Serve(ctx context.Context, g *Guest) error {
	_, _, err := c.ask(ctx, controlRequest{Op: "serve", Guest: g}, g)
	if err == nil {
		g.Served = true
	}
	return err
}

// Guests returns all that the page server serves. The caller closes them.
func (c *Client) Guests(ctx context.Context) (_ []*Guest, err error) {
	r, _, err := c.ask(ctx, controlRequest{Op: "guests"}, nil)
	if err != nil {
		return nil, err
	}
	var all []*Guest
	defer func() {
		if err != nil {
			for _, g := range all {
				g.Close()
			}
		}
	}()
	for _, id := range r.IDs {
		r, fds, err := c.ask(ctx, controlRequest{Op: "guest", ID: id}, nil)
		if errors.Is(err, ErrAnswered) {
			continue // its VMM has ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		if r.Guest == nil {
			closeAll(fds)
			return nil, errors.New("ask page server for a guest: it sent none")
		}
		if err := r.Guest.received(fds); err != nil {
			return nil, fmt.Errorf("ask page server for a guest: %w", err)
		}
		all = append(all, r.Guest)
	}
	return all, nil
}

// Record begins to record anew what the VMM with this pid waits for, as at the start
// of its session, or drops what was recorded: for a VMM whose guest waits.
func (c *Client) Record(ctx context.Context, pid int, on bool) error {
	_, _, err := c.ask(ctx, controlRequest{Op: "record", PID: pid, On: on}, nil)
	return err
}

// Template returns the template, open for writing; with policy copy an error that
// wraps [ErrAnswered]. The caller closes it.
func (c *Client) Template(ctx context.Context) (*os.File, error) {
	_, fds, err := c.ask(ctx, controlRequest{Op: "template"}, nil)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		closeAll(fds)
		return nil, fmt.Errorf("ask page server for template: %d descriptors came", len(fds))
	}
	return os.NewFile(uintptr(fds[0]), "template"), nil
}

// ask puts a question, along with the descriptors of g unless that is nil. The
// descriptors that come with the answer are the caller's.
func (c *Client) ask(ctx context.Context, q controlRequest, g *Guest) (r controlResponse, fds []int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return r, nil, fmt.Errorf("ask page server for %s: %w", q.Op, net.ErrClosed)
	}
	if c.broken {
		if err := c.dial(ctx); err != nil {
			return r, nil, err
		}
	}
	conn := c.conn
	unblock := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	if err = ctx.Err(); err == nil {
		fds, err = c.exchange(q, g, &r)
	}
	if !unblock() || err != nil {
		conn.Close()
		c.broken = true
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}
	if err == nil && r.Error != "" {
		err = fmt.Errorf("%w %s", ErrAnswered, r.Error)
	}
	if err != nil {
		closeAll(fds)
		return controlResponse{}, nil, fmt.Errorf("ask page server for %s: %w", q.Op, err)
	}
	return r, fds, nil
}

func (c *Client) exchange(q controlRequest, g *Guest, r *controlResponse) ([]int, error) {
	write := func(fds []int) error { return writeLine(c.conn, q, fds) }
	var err error
	if g == nil {
		err = write(nil)
	} else {
		err = g.use(write)
	}
	if err != nil {
		return nil, err
	}
	line, fds, err := c.in.next()
	if err != nil {
		return nil, err
	}
	return fds, json.Unmarshal(line, r)
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
