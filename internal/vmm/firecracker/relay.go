package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
)

// runRelayed starts a Firecracker that is jailed, and has it shake hands by itself. The
// page server's socket is out of its reach: it finds one in its jail, and what it says
// there is handed on.
func (l *launch) runRelayed(ctx context.Context, c vmm.RestoreConfig) error {
	server, err := l.serverSocket(c)
	if err != nil {
		return err
	}
	defer server.Close()
	listener, err := l.jail.Listen(jailedServer)
	if err != nil {
		return err
	}
	defer listener.Close()
	if err := l.run(ctx); err != nil {
		return err
	}
	if err := l.connect(ctx); err != nil {
		return err
	}
	// Firecracker touches memory before it answers, so the two go on together.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	relayed := make(chan error, 1)
	go func() {
		err := l.relay(ctx, listener, server)
		if err != nil {
			// It waits for its first page, for ever.
			err = errors.Join(err, l.proc.Kill())
		}
		relayed <- err
	}()
	loadErr := l.load(ctx, c, fcapi.MemoryBackend{Type: fcapi.UFFD, Path: jailedServer})
	if loadErr != nil {
		cancel(loadErr) // nobody may come any more
	}
	relayErr := <-relayed
	if loadErr != nil && !errors.Is(loadErr, fcapi.ErrClosed) || relayErr == nil {
		return loadErr
	}
	if loadErr != nil {
		return fmt.Errorf("%w: %w", loadErr, relayErr)
	}
	return relayErr
}

// relay hands the first handshake on to the page server.
func (l *launch) relay(ctx context.Context, listener *net.UnixListener, server *os.File) error {
	expired := time.Unix(1, 0)
	stop := context.AfterFunc(ctx, func() { _ = listener.SetDeadline(expired) })
	defer stop()
	conn, err := listener.AcceptUnix()
	if err != nil {
		return fmt.Errorf("wait for firecracker's handshake: %w", because(ctx, err))
	}
	defer conn.Close()
	stopConn := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(expired) })
	defer stopConn()
	fd, mappings, err := pageserver.ReceiveHandshake(conn)
	if err != nil {
		return because(ctx, err)
	}
	defer unix.Close(fd)
	return l.handOver(server, fd, mappings)
}

func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}
