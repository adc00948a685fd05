package supervisor

import (
	"errors"
	"fmt"
	"os"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/jail"
)

// containerLog is the file into which the engine writes the guest's log port.
const containerLog = "container.log"

// linger is how long an exited --rm VM that somebody follows is kept for the
// call of Wait that then asks for its exit code.
const linger = 3 * time.Second

// watch waits for the end of a VM that runs, and puts it on record.
func (m *machine) watch() {
	m.mu.Lock()
	vm := m.vm
	m.mu.Unlock()
	if vm == nil {
		return
	}
	select {
	case <-vm.Done():
	case <-m.s.life.Done():
		return
	}
	m.finish(vm)
	if m.view().AutoRemove {
		m.autoRemove()
	}
}

// finish records the end of a VM. A nil vm ended while no supervisor ran.
func (m *machine) finish(vm vmm.VM) {
	m.mu.Lock()
	ag := m.agent
	m.agent = nil
	rec := m.rec
	srv := m.server
	m.mu.Unlock()
	if ag != nil {
		_ = ag.Close()
	}
	code, message, found := exitRecord(m.logFile())
	if !found {
		code = 137 // as docker's of what was killed
	}
	var why string
	switch {
	case rec.KillReason != "":
		why = rec.KillReason
	case found:
		if why = message; why != "" {
			why = "container: " + why
		}
	case rec.Killed:
	default:
		why = "the VM ended without an exit code of its container"
		if srv != nil {
			if f := srv.failure(rec.VM.PID); f != "" {
				why = "its memory could not be served: " + f
			}
		}
		if vm != nil {
			if tail := vm.Tail(); tail != "" {
				why += ":\n" + tail
			}
		}
	}
	m.leaveKin()
	m.letServerGo()
	m.s.claims.Release(m.name)
	now := time.Now()
	err := m.update(func(r *record) {
		m.vm = nil
		r.VM.State = api.StateExited
		r.VM.PID = 0
		r.VM.ExitCode = code
		r.VM.Error = why
		r.VM.Finished = &now
		r.PageServer = nil
	})
	if err != nil {
		m.s.log.Error("recording the end of a VM failed", "vm", m.name, "error", err)
	}
	if err := errors.Join(os.RemoveAll(m.runtime()), jail.Remove(m.dir())); err != nil {
		m.s.log.Warn("removing a VM's sockets and jail failed", "vm", m.name, "error", err)
	}
	m.s.log.Info("VM ended", "vm", m.name, "id", m.id, "exit_code", code, "error", why)
	close(m.exited)
	m.s.stir()
}

// exitRecord finds the exit record at the end of a container's log.
func exitRecord(path string) (code int, message string, found bool) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", false
	}
	defer f.Close()
	// The record is the last one; the reader finds its way from the middle of
	// another.
	end, err := proto.LogFile(f, 4*proto.MaxRecordData)
	if err != nil {
		return 0, "", false
	}
	for r := proto.NewLogReader(end); ; {
		rec, err := r.Next()
		if err != nil {
			return code, message, found
		}
		if rec.Stream == proto.Exit {
			code, message, found = rec.ExitCode, string(rec.Data), true
		}
	}
}

// hold keeps a --rm VM until the returned function is called.
func (m *machine) hold() func() {
	m.mu.Lock()
	m.waiters++
	m.mu.Unlock()
	return func() {
		m.mu.Lock()
		m.waiters--
		m.mu.Unlock()
	}
}

// autoRemove removes an exited --rm VM. A client that is following it is about
// to ask for the exit code, and its Wait removes; else nobody waits for it.
func (m *machine) autoRemove() {
	m.mu.Lock()
	quiet := m.waiters == 0
	started := m.rec.VM.Started
	m.mu.Unlock()
	if !quiet || (started != nil && time.Since(*started) < linger) {
		timer := time.NewTimer(linger)
		defer timer.Stop()
		select {
		case <-m.gone:
			return
		case <-m.s.life.Done():
			return // the next supervisor removes it
		case <-timer.C:
		}
	}
	if err := m.erase(); err != nil {
		m.s.log.Error("removing a VM failed", "vm", m.name, "error", err)
	}
}

// kill ends a VM for good. An exit code of 137 stands in for what the guest can
// no longer say; reason is set when nobody asked for it.
func (m *machine) kill(reason string) error {
	m.mu.Lock()
	vm := m.vm
	m.mu.Unlock()
	if vm == nil {
		return nil
	}
	err := m.update(func(r *record) {
		r.Killed = true
		r.KillReason = reason
	})
	if kerr := vm.Kill(); kerr != nil && !errors.Is(kerr, vmm.ErrGone) {
		return fmt.Errorf("kill VM %s: %w", m.name, errors.Join(kerr, err))
	}
	return err
}
