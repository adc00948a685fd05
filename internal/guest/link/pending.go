package link

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"time"

	"fcvm/internal/guest/proto"
)

const (
	// A greeting is repeated, because a guest that waits for the rest of a frame
	// from an earlier host swallows the first ones.
	helloEvery = 50 * time.Millisecond
	// A clone's guest waits at a frame's end, so that the first is as good as sure
	// to arrive, and others only make work.
	identifyEvery = time.Second
	// Some greetings come with a frame's length of padding before them, so that
	// such a frame is filled up. Not all of them: while the guest boots they queue up.
	firstPadded = 3
)

// Pending is a connection to a guest on which no session has begun. It is not
// safe for concurrent use.
type Pending struct {
	conn net.Conn
	p    *parser
}

// NewPending takes conn over.
func NewPending(conn net.Conn) *Pending {
	return &Pending{conn: conn, p: newParser(conn)}
}

// Close closes the connection.
func (d *Pending) Close() error { return d.conn.Close() }

// Session greets the guest until it answers or ctx ends, and begins a session,
// which owns the connection. When it fails, the connection is closed.
func (d *Pending) Session(ctx context.Context) (*Host, error) {
	hello := make([]byte, helloSize)
	hello[0] = proto.Version
	_, _ = rand.Read(hello[1:]) // never fails (crypto/rand)
	nonce := [nonceSize]byte(hello[1:])
	err := d.exchange(ctx, kindHello, hello, helloEvery, func(f frame) (bool, error) {
		return isAck(f, nonce)
	})
	if err != nil {
		return nil, fmt.Errorf("greet the guest: %w", err)
	}
	return start(d.conn, d.p)
}

// Identify gives a clone's guest its identity, and returns when it is in force, or
// with what the guest says went wrong. When it fails, the connection is closed.
func (d *Pending) Identify(ctx context.Context, identity []byte) error {
	payload := make([]byte, nonceSize, nonceSize+len(identity))
	_, _ = rand.Read(payload) // never fails (crypto/rand)
	nonce := [nonceSize]byte(payload)
	if len(identity) > maxPayload-nonceSize {
		d.conn.Close()
		return fmt.Errorf("identify the guest: identity of %d bytes is too long", len(identity))
	}
	err := d.exchange(ctx, kindIdentify, append(payload, identity...), identifyEvery, func(f frame) (bool, error) {
		if f.kind != kindIdentified || len(f.payload) < nonceSize || [nonceSize]byte(f.payload) != nonce {
			return false, nil
		}
		if said := f.payload[nonceSize:]; len(said) > 0 {
			return true, &proto.Error{Code: 125, Message: string(said)}
		}
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("identify the guest: %w", err)
	}
	return nil
}

// exchange repeats a frame until answer takes one that came back, or ctx ends.
func (d *Pending) exchange(ctx context.Context, k kind, payload []byte, every time.Duration, answer func(frame) (bool, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := make(chan error, 1)
	go func() { sent <- d.repeat(ctx, appendFrame(nil, k, payload), every) }()
	stop := context.AfterFunc(ctx, func() { _ = d.conn.SetReadDeadline(time.Unix(1, 0)) })
	err := d.await(answer)
	inTime := stop()
	cause := context.Cause(ctx)
	cancel()
	if err != nil {
		d.conn.Close() // ends a blocked write too
	}
	sendErr := <-sent
	switch {
	case !inTime:
		d.conn.Close()
		return cause
	case err != nil:
		return err
	case sendErr != nil:
		d.conn.Close()
		return sendErr
	}
	return nil
}

func (d *Pending) await(answer func(frame) (bool, error)) error {
	for {
		f, err := d.p.next()
		if errors.Is(err, errGarbage) {
			continue
		}
		if err != nil {
			return err
		}
		// Others are of a session before ours.
		if done, err := answer(f); done || err != nil {
			return err
		}
	}
}

// repeat returns nil when ctx ended between two frames: what the stream holds
// then is whole.
func (d *Pending) repeat(ctx context.Context, hello []byte, every time.Duration) error {
	padded := append(make([]byte, maxFrame), hello...)
	tick := time.NewTicker(every)
	defer tick.Stop()
	pad := firstPadded
	for i := 1; ; i++ {
		b := hello
		if i == pad {
			b, pad = padded, pad*8
		}
		if _, err := d.conn.Write(b); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func isAck(f frame, nonce [nonceSize]byte) (bool, error) {
	if f.kind != kindAck {
		return false, nil
	}
	version, got, err := parseHello(f.payload)
	if err != nil || got != nonce {
		return false, nil //nolint:nilerr // of a session before ours
	}
	if version != proto.Version {
		return true, fmt.Errorf("the guest's agent speaks version %d, this fcvm speaks %d; it was started by another fcvm: start it anew", version, proto.Version)
	}
	return true, nil
}
