package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// vsockEvery is how often a guest that does not listen yet is asked again.
const vsockEvery = 10 * time.Millisecond

// errNotListening means that the guest has nobody on the port (yet): Firecracker
// closes the connection.
var errNotListening = errors.New("the guest does not listen")

// dialer makes a connection to Firecracker's vsock socket.
type dialer func(context.Context) (net.Conn, error)

// dialGuest connects to a vsock port of the guest through Firecracker's socket. It
// tries until the guest listens, ctx ends, or ended is closed.
func dialGuest(ctx context.Context, dial dialer, port int, ended <-chan struct{}) (net.Conn, error) {
	tick := time.NewTicker(vsockEvery)
	defer tick.Stop()
	for {
		conn, err := dialOnce(ctx, dial, port)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ended:
			return nil, err
		default:
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		}
		if !errors.Is(err, errNotListening) {
			return nil, err
		}
		select {
		case <-ctx.Done():
		case <-ended:
		case <-tick.C:
		}
	}
}

func dialOnce(ctx context.Context, dial dialer, port int) (_ net.Conn, err error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			conn.Close()
		}
	}()
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotListening, err)
	}
	return conn, readAnswer(conn)
}

// maxAnswer bounds the answer's line: "OK " and a port.
const maxAnswer = 32

// readAnswer reads "OK PORT\n", and not a byte more: what follows is the guest's.
func readAnswer(r io.Reader) error {
	var line strings.Builder
	b := make([]byte, 1)
	for line.Len() < maxAnswer {
		if _, err := io.ReadFull(r, b); err != nil {
			// EOF, or a reset: nobody listens, or the guest is not that far.
			return fmt.Errorf("%w: %w", errNotListening, err)
		}
		if b[0] == '\n' {
			if strings.HasPrefix(line.String(), "OK ") {
				return nil
			}
			break
		}
		line.WriteByte(b[0])
	}
	return fmt.Errorf("firecracker answers %.40q on its vsock", line.String())
}
