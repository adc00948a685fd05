package instance

import (
	"errors"
	"net"

	"fcvm/internal/pageserver"
	"fcvm/internal/vmm/process"
)

// HandOver gives the page server at the other end of conn a VMM's userfaultfd, and a pidfd
// by which it knows and, should a fault be impossible to answer, kills the VMM. The
// caller keeps the userfaultfd.
func HandOver(conn *net.UnixConn, p *process.Process, uffd int, mappings []pageserver.Mapping) error {
	pidfd, err := p.Dup()
	if err != nil {
		return err
	}
	defer pidfd.Close()
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(pidfd uintptr) { sent = pageserver.SendHandshake(conn, uffd, int(pidfd), mappings) })
	return errors.Join(err, sent)
}
