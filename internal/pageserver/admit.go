//go:build linux

package pageserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// serveVMM serves a clone whose VMM connected to the handshakes' socket.
func (s *Server) serveVMM(ctx context.Context, conn *net.UnixConn) {
	ses, err := s.admit(ctx, conn)
	if err != nil {
		s.refuse(err)
		conn.Close()
		return
	}
	s.serve(ctx, ses)
}

func (s *Server) refuse(err error) {
	s.mu.Lock()
	s.refused++
	s.mu.Unlock()
	s.config.Log.Warn("connection refused", "error", err)
}

// admit shakes hands.
func (s *Server) admit(ctx context.Context, conn *net.UnixConn) (*session, error) {
	g, err := s.reception.Receive(ctx, conn, s.config.AllowUIDs)
	if err != nil {
		return nil, err
	}
	defer g.Close()
	if err := g.MakeLedger(s.source.size); err != nil {
		return nil, s.failGuest(g, err)
	}
	return s.take(g, conn)
}

// take makes a session of a guest, of which it duplicates the descriptors.
func (s *Server) take(g *Guest, conn *net.UnixConn) (_ *session, err error) {
	regions, err := checkMappings(g.Regions, s.source.size)
	if err == nil && regions[0].PageSize != pageSize && s.template != nil {
		err = fmt.Errorf("check handshake: pages of %d bytes cannot be shared; use --policy copy", regions[0].PageSize)
	}
	if err != nil {
		return nil, s.failGuest(g, err)
	}
	ses := &session{
		server: s, id: g.ID, conn: conn, regions: regions, pageSize: regions[0].PageSize,
		started: time.Now(), over: make(chan struct{}),
	}
	if ses.vmm, err = g.process(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ses.vmm.close()
		}
	}()
	if ses.fd, err = g.uffd.Dup(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ses.fd.Close()
		}
	}()
	ledgerFD, err := dup(g.ledger)
	if err != nil {
		return nil, err
	}
	if ses.ledger, err = openLedger(os.NewFile(uintptr(ledgerFD), "ledger"), s.source.size/pageSize); err != nil {
		return nil, err
	}
	ses.events = uffd.BufferOver(ses.ledger.events())
	ses.ledger.load(&ses.counters)
	if ses.attendant.buf, err = newBuffer(window); err == nil && g.Served {
		err = ses.takeOver()
	}
	if err != nil {
		freeBuffers([][]byte{ses.attendant.buf})
		ses.ledger.close()
		return nil, err
	}
	ses.attendant.done = make(chan struct{})
	s.begin(ses)
	if g.Served {
		ses.record(false) // what it waited for first is told, or lost
	}
	return ses, nil
}

// failGuest ends a VMM that handed its memory over, and would wait for it for ever.
func (s *Server) failGuest(g *Guest, reason error) error {
	vmm, err := g.process()
	if err != nil {
		return errors.Join(reason, err)
	}
	s.fail(vmm, reason)
	vmm.close()
	return reason
}

func dup(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(n uintptr) { fd, dupErr = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, dupErr)
}
