//go:build linux

package pageserver

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// Guest is the memory of one VM that is, or is to be, served: its regions, and the
// descriptors by which that is done. Who holds a Guest can have the memory served
// on, whatever becomes of the page server.
type Guest struct {
	// ID tells guests apart.
	ID string `json:"id"`
	// PID of the VMM.
	PID int `json:"pid"`
	// Regions of guest memory, in any order.
	Regions []Mapping `json:"regions"`
	// Served tells that a page server served it already.
	Served bool `json:"served"`

	uffd          *uffd.FD
	pidfd, ledger *os.File
}

// guest takes the handshake's descriptors for a guest, which the caller closes.
func (h *handshake) guest(conn *net.UnixConn, cred *unix.Ucred) (_ *Guest, err error) {
	g := &Guest{Regions: h.mappings}
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	if g.uffd, err = uffd.FromFD(h.takeFD()); err != nil {
		return nil, err
	}
	var vmm *process
	if len(h.fds) > 0 {
		vmm, err = newProcess(h.takeFD(), cred)
	} else {
		vmm, err = peerProcess(conn, cred)
	}
	if err != nil {
		return nil, err
	}
	g.ID, g.PID, g.pidfd = rand.Text(), vmm.pid, vmm.fd
	return g, nil
}

// MakeLedger makes what the guest's page servers must not forget, for a memory
// file of size bytes.
func (g *Guest) MakeLedger(size int64) error {
	f, err := newLedgerFile(size / pageSize)
	if err != nil {
		return err
	}
	g.ledger = f
	return nil
}

// Wait returns when the VMM has ended, or after Close.
func (g *Guest) Wait() (ended bool) { return (&process{pid: g.PID, fd: g.pidfd}).waitEnd() }

// Kill ends the VMM at once. One that has ended is no error.
func (g *Guest) Kill() error { return (&process{pid: g.PID, fd: g.pidfd}).kill() }

// Close gives up the descriptors. It is idempotent.
func (g *Guest) Close() {
	if g.uffd != nil {
		g.uffd.Close()
	}
	if g.pidfd != nil {
		g.pidfd.Close()
	}
	if g.ledger != nil {
		g.ledger.Close()
	}
}

// use runs fn with the descriptors in the order in which they are sent.
func (g *Guest) use(fn func(fds []int) error) error {
	pidfd, err := dup(g.pidfd)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	return g.uffd.Use(func(fd int) error { return fn([]int{fd, pidfd, int(g.ledger.Fd())}) })
}

// process is the VMM, by a descriptor of its own.
func (g *Guest) process() (*process, error) {
	fd, err := dup(g.pidfd)
	if err != nil {
		return nil, fmt.Errorf("take over pidfd of the VMM (pid %d): %w", g.PID, err)
	}
	return &process{pid: g.PID, fd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// received completes a guest whose JSON came with these descriptors, which are
// its own then, also when it fails.
func (g *Guest) received(fds []int) (err error) {
	if len(fds) != 3 {
		closeAll(fds)
		return fmt.Errorf("%d descriptors came with a guest, want 3", len(fds))
	}
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	g.ledger = os.NewFile(uintptr(fds[2]), "ledger")
	// Waited for by the runtime's poller, so that it must not block.
	nonblock := unix.SetNonblock(fds[1], true)
	g.pidfd = os.NewFile(uintptr(fds[1]), "pidfd")
	if g.uffd, err = uffd.FromFD(fds[0]); err != nil {
		return err
	}
	if nonblock != nil {
		return fmt.Errorf("take over pidfd of the VMM (pid %d): %w", g.PID, nonblock)
	}
	if len(g.Regions) == 0 || g.PID <= 0 || g.ID == "" {
		return errors.New("a guest without an ID, a pid or regions")
	}
	return nil
}
