//go:build linux

package pageserver

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	// handshakeTimeout bounds how long a VMM may take to say what it has. A VMM on a
	// machine that is itself emulated took more than 5 s between its connect and its
	// message, with nine others that started.
	handshakeTimeout = time.Minute
	// maxHandshakes are waited for at a time. It is more than start at once on one
	// machine, and less than a process has file descriptors by default (1024).
	maxHandshakes = 256
)

// errCrowded ends the connection that has said nothing for the longest time.
var errCrowded = errors.New("receive handshake: too many others wait as well")

// Reception shakes hands with VMMs, and bounds how many may keep it waiting. The zero
// value is ready for use, by several goroutines at a time.
type Reception struct {
	// mu guards waiting, the connections in the order in which they came.
	mu      sync.Mutex
	waiting []*net.UnixConn
}

// Receive shakes hands with the VMM, or who attached to it, on the other side of conn,
// which it leaves open. Root, this user and those in allow may connect. A VMM has one minute
// to say what it has; when more than 256 are at it, the oldest of them is turned away, and its
// connection closed. The caller closes the guest.
func (r *Reception) Receive(ctx context.Context, conn *net.UnixConn, allow []int) (*Guest, error) {
	cred, err := credentials(conn, allow)
	if err != nil {
		return nil, err
	}
	r.enter(conn)
	h, err := await(ctx, conn)
	if !r.leave(conn) {
		if err == nil {
			h.close()
		}
		return nil, errCrowded
	}
	if err != nil {
		return nil, err
	}
	defer h.close()
	return h.guest(conn, cred)
}

func (r *Reception) enter(conn *net.UnixConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) == maxHandshakes {
		r.waiting[0].Close()
		r.waiting = slices.Delete(r.waiting, 0, 1)
	}
	r.waiting = append(r.waiting, conn)
}

// leave is false where enter has closed the connection.
func (r *Reception) leave(conn *net.UnixConn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.Index(r.waiting, conn)
	if i < 0 {
		return false
	}
	r.waiting = slices.Delete(r.waiting, i, i+1)
	return true
}

// await reads the handshake, within its time. The caller closes it.
func await(ctx context.Context, conn *net.UnixConn) (_ *handshake, err error) {
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return nil, err
	}
	unblock := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	h, err := receiveHandshake(conn)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}
