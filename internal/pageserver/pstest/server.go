//go:build linux

package pstest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Server is a page server under test, any program, and a process of its own.
type Server struct {
	// Socket is where VMMs connect.
	Socket string
	// MemFile is the snapshot's memory, made by [WriteSnapshot].
	MemFile string
	// Template is what VMMs map, open for reading, for shape [Template].
	Template *os.File

	cmd   *exec.Cmd
	dir   string
	log   bytes.Buffer // read after ended
	ended chan struct{}
	err   error
	stop  func() error
	// asked is whether its end was asked for, killed whether it did not obey.
	asked, killed bool
}

// StartServer makes a snapshot of so many pages and starts a program that is to serve it, and
// returns when its socket is there. In args, {socket}, {mem} and {template} stand for the
// path of the socket, the memory file, and an empty memfd of its size; {dir} for an
// empty directory, which is gone afterwards. The caller stops it.
func StartServer(args []string, pages int) (_ *Server, err error) {
	dir, err := os.MkdirTemp("", "pstest") // short, for the socket
	if err != nil {
		return nil, fmt.Errorf("start page server: %w", err)
	}
	s := &Server{Socket: filepath.Join(dir, "s"), MemFile: filepath.Join(dir, "mem"), dir: dir, ended: make(chan struct{})}
	defer func() {
		if err != nil {
			s.remove()
			err = fmt.Errorf("start page server: %w", err)
		}
	}()
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		return nil, err
	}
	if err := WriteSnapshot(s.MemFile, pages); err != nil {
		return nil, err
	}
	template, err := s.makeTemplate(int64(pages) * PageSize)
	if err != nil {
		return nil, err
	}
	defer template.Close()
	replace := strings.NewReplacer("{socket}", s.Socket, "{mem}", s.MemFile, "{template}", "/proc/self/fd/3", "{dir}", filepath.Join(dir, "d"))
	named := make([]string, len(args))
	for i, a := range args {
		named[i] = replace.Replace(a)
	}
	s.cmd = exec.Command(named[0], named[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.ExtraFiles = []*os.File{template}
	// A signal to this process's group, such as Ctrl-C, is not for it to answer.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.err = s.cmd.Wait(); close(s.ended) }()
	s.stop = sync.OnceValue(s.stopOnce)
	for begin := time.Now(); time.Since(begin) < patience; {
		if _, err := os.Lstat(s.Socket); err == nil {
			return s, nil
		}
		select {
		case <-s.ended:
			return nil, fmt.Errorf("it ended: %v: %s", s.cmd.ProcessState, s.Log())
		case <-time.After(time.Millisecond):
		}
	}
	return nil, fmt.Errorf("it has made no socket after %v: %s", patience, s.end(unix.SIGTERM))
}

// makeTemplate makes it, and keeps it open for reading only, as VMMs are to have it.
func (s *Server) makeTemplate(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("pstest-template", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	template := os.NewFile(uintptr(fd), "template")
	if err := template.Truncate(size); err != nil {
		return nil, errors.Join(err, template.Close())
	}
	if s.Template, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		return nil, errors.Join(err, template.Close())
	}
	return template, nil
}

// PID of the page server.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Ended is closed when it has ended.
func (s *Server) Ended() <-chan struct{} { return s.ended }

// Stop ends it by SIGTERM, and removes what was made for it. The error tells of
// one that had ended before, or did not end for half a minute and was killed.
func (s *Server) Stop() error { return s.stop() }

func (s *Server) stopOnce() error {
	defer s.remove()
	select {
	case <-s.ended:
		if !s.asked {
			return fmt.Errorf("page server ended by itself: %v: %s", s.cmd.ProcessState, s.Log())
		}
		return nil
	default:
	}
	switch log := s.end(unix.SIGTERM); {
	case s.killed:
		return fmt.Errorf("stop page server: it did not end for SIGTERM: %s", log)
	case strings.Contains(log, "WARNING: DATA RACE"): // it was built with -race
		return fmt.Errorf("page server: %s", log)
	}
	return nil
}

// end ends it by a signal, and returns what it printed.
func (s *Server) end(signal unix.Signal) string {
	s.asked = true
	_ = s.cmd.Process.Signal(signal)
	_ = s.cmd.Process.Signal(unix.SIGCONT) // a scenario that failed may have stopped it
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.killed = true
		_ = s.cmd.Process.Kill()
		<-s.ended
	}
	return s.Log()
}

func (s *Server) remove() {
	if s.Template != nil {
		s.Template.Close()
	}
	_ = os.RemoveAll(s.dir)
}

// Log is the end of what the page server printed, once it has ended, without the
// stacks of goroutines that are the Go runtime's own.
func (s *Server) Log() string {
	var kept []string
	for block := range strings.SplitSeq(strings.TrimSpace(s.log.String()), "\n\n") {
		if !strings.HasPrefix(block, "goroutine ") || !runtimeOwn(block) {
			kept = append(kept, block)
		}
	}
	log := strings.Join(kept, "\n\n")
	return log[max(0, len(log)-maxLog):]
}

// maxLog bounds what is told of a page server's output.
const maxLog = 32 << 10

func runtimeOwn(stack string) bool {
	_, frames, _ := strings.Cut(stack, "\n")
	for line := range strings.SplitSeq(frames, "\n") {
		line = strings.TrimPrefix(line, "created by ")
		if !strings.HasPrefix(line, "runtime.") && !strings.HasPrefix(line, "\t") {
			return false
		}
	}
	return true
}
