// Package qmp speaks the QEMU Machine Protocol: JSON objects, one a line, over
// a unix socket. QEMU serves one client at a time; a second connection waits in
// the listening queue.
//
// A [Client] owns its connection and one goroutine that reads it. When QEMU
// ends or sends what is no QMP, every call fails with an error that wraps
// [ErrClosed]. When QEMU hangs, calls end with their context; the late answer
// is then dropped, and the client stays usable.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// ErrClosed means that the connection ended, because QEMU did or by Close.
var ErrClosed = errors.New("QMP connection closed")

// CommandTimeout bounds commands whose context has no deadline.
const CommandTimeout = 30 * time.Second

// Client is a QMP connection. Its methods may be called concurrently.
type Client struct {
	conn    net.Conn
	onEvent func(Event)
	ended   chan struct{} // closed when the reader ended; err is set before

	mu      sync.Mutex // guards what follows
	nextID  uint64
	pending map[uint64]chan message
	err     error

	writeMu sync.Mutex // held for one whole command on the wire
}

// New takes over conn and negotiates QMP's capabilities. The connection may be
// one that QEMU has not accepted yet: commands given before QEMU runs wait in
// the socket. onEvent, which may be nil, is called from the reading goroutine
// and must neither block nor call the client.
//
// When it fails, conn is closed.
func New(ctx context.Context, conn net.Conn, onEvent func(Event)) (*Client, error) {
	c := &Client{
		conn:    conn,
		onEvent: onEvent,
		ended:   make(chan struct{}),
		pending: make(map[uint64]chan message),
	}
	go c.read()
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// Close ends the connection and waits for the reader. It is idempotent.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.ended
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.ended }

// Do gives a command and waits for its answer, which it stores in result unless
// that is nil. args is marshalled to JSON; nil means none. The error is an
// [*Error] when QEMU refused, wraps [ErrClosed] when QEMU ended, or ctx's error
// when no answer came in time.
func (c *Client) Do(ctx context.Context, command string, args, result any) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, CommandTimeout, fmt.Errorf("no answer within %v: %w", CommandTimeout, context.DeadlineExceeded))
		defer cancel()
	}
	id, answer, err := c.register()
	if err != nil {
		return fmt.Errorf("qemu: %s: %w", command, err)
	}
	defer c.forget(id)
	if err := c.write(ctx, id, command, args); err != nil {
		return fmt.Errorf("qemu: %s: %w", command, err)
	}
	select {
	case m := <-answer:
		return decode(command, m, result)
	case <-c.ended:
		// The answer may have come just before the end.
		select {
		case m := <-answer:
			return decode(command, m, result)
		default:
			return fmt.Errorf("qemu: %s: %w", command, c.failed())
		}
	case <-ctx.Done():
		return fmt.Errorf("qemu: %s: %w", command, context.Cause(ctx))
	}
}

func decode(command string, m message, result any) error {
	if m.kind == failure {
		return &Error{Command: command, Class: m.class, Desc: m.desc}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.result, result); err != nil {
		return fmt.Errorf("qemu: %s: %w: %w", command, errMalformed, err)
	}
	return nil
}

func (c *Client) register() (uint64, chan message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	c.nextID++ // from 1: 0 is no id
	answer := make(chan message, 1)
	c.pending[c.nextID] = answer
	return c.nextID, answer, nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

func (c *Client) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// write sends a command. A QEMU that reads nothing can't hold it longer than
// ctx; a command that was sent in part makes the connection useless, so it is
// then closed.
func (c *Client) write(ctx context.Context, id uint64, command string, args any) error {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("encode arguments: %w", err)
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	deadline, _ := ctx.Deadline()
	if err := c.conn.SetWriteDeadline(deadline); err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		_ = c.conn.Close()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return nil
}

// read runs until the connection ends.
func (c *Client) read() {
	err := c.readLines()
	_ = c.conn.Close()
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	close(c.ended)
}

func (c *Client) readLines() error {
	s := bufio.NewScanner(c.conn)
	s.Buffer(make([]byte, 0, 4096), MaxLine)
	for s.Scan() {
		if len(s.Bytes()) == 0 {
			continue
		}
		m, err := parse(s.Bytes())
		if err != nil {
			return fmt.Errorf("%w: %w", ErrClosed, err)
		}
		switch m.kind {
		case event:
			if c.onEvent != nil {
				c.onEvent(m.event)
			}
		case reply, failure:
			c.deliver(m)
		}
	}
	if err := s.Err(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return fmt.Errorf("%w: %w", ErrClosed, io.EOF)
}

// deliver hands an answer to who waits for it. An answer without an id is
// QEMU's to a line that it could not read, and belongs to the only command on
// the wire, if there is just one.
func (c *Client) deliver(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := m.id
	if id == 0 && len(c.pending) == 1 {
		for id = range c.pending {
		}
	}
	if answer, ok := c.pending[id]; ok {
		delete(c.pending, id)
		answer <- m // holds one
	}
}
