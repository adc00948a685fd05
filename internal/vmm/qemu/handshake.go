package qemu

import (
	"context"
	"fmt"
	"net"

	"fcvm/internal/pageserver"
	"fcvm/internal/uffd"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/instance"
)

// shakeHands gives the page server QEMU's userfaultfd.
func (l *launch) shakeHands(ctx context.Context, socket string, fd *uffd.FD, r vmm.Region) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("connect to the page server: %w", err)
	}
	defer conn.Close()
	mappings := []pageserver.Mapping{{Addr: r.Addr, Size: uint64(r.Size), Offset: uint64(r.Offset)}}
	return fd.Use(func(fd int) error { return instance.HandOver(conn.(*net.UnixConn), l.proc, fd, mappings) })
}
