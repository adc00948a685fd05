package qemu

import (
	"context"
	"fmt"
	"net"

	"fcvm/internal/pageserver"
	"fcvm/internal/uffd"
	"fcvm/internal/vmm"
)

// shakeHands gives the page server QEMU's userfaultfd, and a pidfd by which it
// knows and, should a fault be impossible to answer, kills QEMU.
func (l *launch) shakeHands(ctx context.Context, socket string, fd *uffd.FD, r vmm.Region) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("connect to the page server: %w", err)
	}
	defer conn.Close()
	server := conn.(*net.UnixConn)
	pidfd, err := l.proc.Dup()
	if err != nil {
		return err
	}
	defer pidfd.Close()
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(pidfd uintptr) {
		sent = fd.Use(func(fd int) error {
			return pageserver.SendHandshake(server, fd, int(pidfd), []pageserver.Mapping{{
				Addr:   r.Addr,
				Size:   uint64(r.Size),
				Offset: uint64(r.Offset),
			}})
		})
	})
	if err != nil {
		return err
	}
	return sent
}
