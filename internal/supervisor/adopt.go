package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"fcvm/internal/api"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/jail"
)

// adopt takes over the VM of one directory, whatever state an earlier supervisor
// left it in.
func (s *Supervisor) adopt(ctx context.Context, id string) error {
	dir := s.o.Layout.VM(id)
	rec, err := loadRecord(dir)
	if errors.Is(err, os.ErrNotExist) {
		// A VMM that was started ahead, or a creation that had not begun to be
		// recorded: nobody's VM.
		return errors.Join(killUsers(dir), jail.Remove(dir), os.RemoveAll(dir))
	}
	if err != nil {
		return err
	}
	m := newMachine(s, *rec)
	if err := s.enter(m); err != nil {
		return err
	}
	switch rec.VM.State {
	case api.StateExited:
		close(m.exited)
		if rec.VM.AutoRemove {
			return m.erase()
		}
		return nil
	case api.StateCreating:
		// Who asked for it has gone with the earlier supervisor.
		s.log.Info("removing a VM whose start was cut off", "vm", m.name)
		if err := m.endUnfinished(ctx, rec); err != nil {
			return err
		}
		close(m.exited)
		return m.erase()
	}
	vm, err := s.takeOver(ctx, rec.Handle)
	if errors.Is(err, vmm.ErrGone) {
		m.finish(nil)
		if rec.VM.AutoRemove {
			return m.erase()
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("adopt VM %s: %w", m.name, err)
	}
	m.mu.Lock()
	m.vm = vm
	m.mu.Unlock()
	s.claims.Hold(m.name, rec.VM.Ports)
	if rec.VM.Snapshot != "" {
		m.kin = s.spares.join(s.kindOf(rec))
	}
	if rec.PageServer != nil {
		if err := s.servers.adopt(ctx, m, rec.PageServer); err != nil {
			// Without it the guest waits for its memory for ever.
			reason := fmt.Sprintf("its page server ended together with the supervisor, and with it went the way to its memory (%v)", err)
			s.log.Error("page server is gone", "vm", m.name, "error", err)
			if err := m.kill(reason); err != nil {
				s.log.Error("ending a VM failed", "vm", m.name, "error", err)
			}
		}
	}
	if rec.VM.State == api.StateRunning {
		// It may have been paused for a snapshot when that supervisor died.
		if err := vm.Resume(ctx); err != nil && !errors.Is(err, vmm.ErrGone) {
			s.log.Error("resuming a VM failed", "vm", m.name, "error", err)
		}
	}
	s.spawn(m.watch)
	s.log.Info("VM adopted", "vm", m.name, "id", m.id, "pid", rec.Handle.PID)
	return nil
}

// kindOf is what a clone on record and a spare for others of its kind have in common.
func (s *Supervisor) kindOf(rec *record) kind {
	k := kind{serverKey{Snapshot: rec.VM.Snapshot}, rec.VM.MemBackend, rec.VM.Merge, rec.VM.Jailed}
	if rec.PageServer != nil {
		k.serverKey = rec.PageServer.Key
	} else if snap, err := s.snapshots.Get(rec.VM.Snapshot); err == nil {
		k.Sum = snap.Sum // the clone's lease keeps the snapshot from being replaced
	}
	return k
}

// enter puts a machine into the tables under the ID and name on record.
func (s *Supervisor) enter(m *machine) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.names[m.name]; other != nil {
		return fmt.Errorf("VM %s has the name of VM %s: %s", m.id, other.id, m.name)
	}
	s.byID[m.id], s.names[m.name] = m, m
	return nil
}

func (s *Supervisor) takeOver(ctx context.Context, h *vmm.Handle) (vmm.VM, error) {
	eng, err := s.engine(h.Engine)
	if err != nil {
		return nil, err
	}
	return eng.Adopt(ctx, *h)
}

// endUnfinished kills the VMM of a VM whose start was cut off. One that started
// just before it could be recorded is found by the directory on its command line.
func (m *machine) endUnfinished(ctx context.Context, rec *record) error {
	if rec.Handle != nil {
		vm, err := m.s.takeOver(ctx, rec.Handle)
		switch {
		case err == nil:
			end(vm)
			return nil
		case !errors.Is(err, vmm.ErrGone):
			m.s.log.Warn("VMM does not answer and is killed", "vm", m.name, "error", err)
		}
	}
	return killUsers(m.dir())
}

// sweep removes sockets that belong to nothing any more, and ends what still
// listens there: page servers that were started for a clone which was cut off, and
// VMMs whose record somebody deleted.
func (s *Supervisor) sweep() {
	entries, err := os.ReadDir(s.o.Layout.Runtime)
	if err != nil {
		s.log.Warn("looking for left sockets failed", "error", err)
		return
	}
	used := map[string]bool{}
	for _, m := range s.machines() {
		used[m.id] = true
	}
	for _, p := range s.servers.list() {
		used[filepath.Base(p.runtime)] = true
	}
	for _, e := range entries {
		name := e.Name()
		if !e.IsDir() || used[name] || !idPattern.MatchString(name) && !strings.HasPrefix(name, serverPrefix) {
			continue
		}
		// A VM whose record could not be read is nobody's to end.
		if _, err := os.Stat(s.o.Layout.VM(name)); err == nil {
			continue
		}
		dir := filepath.Join(s.o.Layout.Runtime, name)
		s.log.Info("removing what belongs to no VM", "dir", dir)
		if err := errors.Join(killUsers(dir), os.RemoveAll(dir)); err != nil {
			s.log.Warn("removing left sockets failed", "dir", dir, "error", err)
		}
	}
}

// killUsers kills the processes that name something below dir on their command
// line, or are jailed there, and lead a session of their own, as every VMM and page server does and a
// person's `tail` in a terminal does not. It waits for their end.
func killUsers(dir string) error {
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	jails := jail.Roots(dir)
	var errs []error
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() {
			continue
		}
		// The pidfd first: what is then read is of the process that it will kill.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if sid, serr := unix.Getsid(pid); err == nil && serr == nil && sid == pid && (namesDir(cmdline, dir) || jailedIn(p, jails)) {
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("kill process %d: %w", pid, err))
			} else {
				waitPidfd(fd)
			}
		}
		_ = unix.Close(fd)
	}
	return errors.Join(errs...)
}

// jailedIn tells whether the root of a process (its directory in /proc) is one of these.
func jailedIn(proc string, roots []string) bool {
	if len(roots) == 0 {
		return false
	}
	have, err := os.Stat(filepath.Join(proc, "root"))
	return err == nil && slices.ContainsFunc(roots, func(root string) bool {
		want, err := os.Stat(root)
		return err == nil && os.SameFile(have, want)
	})
}

func namesDir(cmdline []byte, dir string) bool {
	return bytes.Contains(cmdline, []byte(dir+"/"))
}

// waitPidfd waits until a killed process has ended.
func waitPidfd(fd int) {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
