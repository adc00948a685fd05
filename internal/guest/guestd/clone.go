package guestd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"fcvm/internal/guest/proto"
)

// dbusID is D-Bus's copy of machine-id(5).
const dbusID = "/var/lib/dbus/machine-id"

// cloneFiles are the files that hold a VM's identity, open and read before a
// snapshot: what a clone has to do for itself then is to write some bytes. The
// time until it is ready is, under TCG, the time to translate every function that
// this takes, in Go's runtime and in the kernel.
type cloneFiles struct {
	hostname, hosts, machineID, dbusID *cloneFile
	// otherHosts is /etc/hosts without this machine's own line.
	otherHosts string
}

type cloneFile struct {
	f    *os.File
	fd   uintptr
	size int64
}

// BeforeSnapshot implements link.Handler: it does what every clone would have to.
func (s *Server) BeforeSnapshot() {
	s.AfterSnapshot()
	s.files, s.filesErr = s.openFiles()
}

// AfterSnapshot implements link.Handler.
func (s *Server) AfterSnapshot() {
	if s.files == nil {
		return
	}
	for _, f := range []*cloneFile{s.files.hostname, s.files.hosts, s.files.machineID, s.files.dbusID} {
		if f != nil {
			f.f.Close()
		}
	}
	s.files, s.filesErr = nil, nil
}

func (s *Server) openFiles() (_ *cloneFiles, err error) {
	c := &cloneFiles{}
	if c.hostname, err = openCloneFile(s.etc("hostname")); err != nil {
		return c, err
	}
	if c.machineID, err = openCloneFile(s.etc("machine-id")); err != nil {
		return c, err
	}
	if fi, err := os.Lstat(dbusID); s.cfg.Etc == "/etc" && err == nil && fi.Mode().IsRegular() {
		if c.dbusID, err = openCloneFile(dbusID); err != nil {
			return c, err
		}
	}
	if s.cfg.Address == "" {
		return c, nil
	}
	if c.hosts, err = openCloneFile(s.etc("hosts")); err != nil {
		return c, err
	}
	old, err := io.ReadAll(c.hosts.f)
	if err != nil {
		return c, fmt.Errorf("read %s: %w", c.hosts.f.Name(), err)
	}
	c.otherHosts = otherHosts(string(old), s.cfg.Address)
	return c, nil
}

func openCloneFile(path string) (*cloneFile, error) {
	if err := makeRegular(path); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &cloneFile{f: f, fd: f.Fd(), size: fi.Size()}, nil
}

// write replaces the content. System calls are raw: they do not block for long,
// and Go's scheduler would start threads for those that do.
func (f *cloneFile) write(content string) error {
	for off := 0; off < len(content); {
		b := content[off:]
		n, _, errno := syscall.RawSyscall6(syscall.SYS_PWRITE64, f.fd, uintptr(unsafe.Pointer(unsafe.StringData(b))), uintptr(len(b)), uintptr(off), 0, 0)
		if errno == syscall.EINTR {
			continue
		}
		if errno != 0 {
			return fmt.Errorf("write %s: %w", f.f.Name(), errno)
		}
		off += int(n)
	}
	if int64(len(content)) >= f.size {
		return nil
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_FTRUNCATE, f.fd, uintptr(len(content)), 0); errno != 0 {
		return fmt.Errorf("write %s: %w", f.f.Name(), errno)
	}
	return nil
}

// Identify implements link.Handler: it gives a clone what makes it itself, and
// returns when all of it is in force. Entropy comes first: what follows may
// already draw random numbers.
func (s *Server) Identify(b []byte) error {
	id, err := proto.ParseIdentity(b)
	if err != nil {
		return err
	}
	if id.Hostname != "" && !validHostname(id.Hostname) {
		return fmt.Errorf("host name %q is not valid", id.Hostname)
	}
	if id.MachineID != "" && (len(id.MachineID) != 32 || strings.Trim(id.MachineID, "0123456789abcdef") != "") {
		return fmt.Errorf("machine id %q is not 32 lower-case hexadecimal digits", id.MachineID)
	}
	clockOnly := id.Hostname == "" && id.MachineID == "" && len(id.Entropy) == 0
	if s.files == nil && !clockOnly {
		s.BeforeSnapshot()
	}
	// Also when the files could not be opened: the random numbers come first.
	if len(id.Entropy) > 0 {
		if err := s.cfg.System.AddEntropy(id.Entropy); err != nil {
			return fmt.Errorf("seed random number generator: %w", err)
		}
	}
	if !id.Wall.IsZero() {
		if err := s.cfg.System.SetClock(id.Wall); err != nil {
			return fmt.Errorf("set clock: %w", err)
		}
	}
	if clockOnly {
		return nil
	}
	if s.filesErr != nil {
		return fmt.Errorf("give the clone its identity: %w", s.filesErr)
	}
	if id.Hostname != "" {
		if err := s.rename(id.Hostname); err != nil {
			return err
		}
	}
	if id.MachineID == "" {
		return nil
	}
	err = s.files.machineID.write(id.MachineID + "\n")
	if s.files.dbusID != nil {
		err = errors.Join(err, s.files.dbusID.write(id.MachineID+"\n"))
	}
	return err
}

func (s *Server) rename(name string) error {
	if err := s.cfg.System.SetHostname(name); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	s.mu.Lock()
	s.hostname = name
	s.mu.Unlock()
	if err := s.files.hostname.write(name + "\n"); err != nil {
		return err
	}
	if s.files.hosts == nil {
		return nil
	}
	return s.files.hosts.write(s.files.otherHosts + hostLine(s.cfg.Address, name))
}
