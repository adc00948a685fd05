//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"fcvm/bench/internal/lab"
	"fcvm/bench/internal/report"
	"fcvm/internal/datadir"
	"fcvm/internal/pageserver"
	"fcvm/internal/supervisor"
	"fcvm/internal/uffd"
)

// record writes to path in which order a real clone of nginx touches its memory, from
// its load until it has answered a request. The supervisor is the real one, but for its page
// server, which is in this process and writes down what it answers.
func record(ctx context.Context, bin, path string) (err error) {
	l, err := lab.New(ctx, bin)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := snapshotNginx(ctx, l, []string{"nginx"}); err != nil {
		return err
	}
	if _, err := l.FCVM(ctx, "serve", "--stop"); err != nil {
		return err
	}
	d, err := datadir.Open(l.Data())
	if err != nil {
		return err
	}
	// The supervisor here passes for that of the CLI.
	out, err := l.FCVM(ctx, "version", "--json")
	if err != nil {
		return err
	}
	var version struct {
		FCVM string `json:"fcvm"`
	}
	if err := json.Unmarshal([]byte(out), &version); err != nil {
		return err
	}
	r := &recorder{}
	// The CLI is not to start another supervisor while this one lives.
	life, end := context.WithCancel(ctx)
	var work sync.WaitGroup
	var served error
	work.Go(func() {
		served = supervisor.Run(life, supervisor.Options{
			Layout: d, Version: version.FCVM, PageServers: r, Log: slog.New(slog.DiscardHandler),
		})
	})
	defer func() { end(); work.Wait(); err = errors.Join(err, served) }()
	port, err := lab.FreePorts(1)
	if err != nil {
		return err
	}
	if _, err := l.FCVM(ctx, "clone", "--snapshot", "nginx", "--name", "c", "-p", fmt.Sprintf("127.0.0.1:%d:80", port)); err != nil {
		return err
	}
	if err := lab.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/", port)); err != nil {
		return err
	}
	got, err := r.result()
	if err != nil {
		return err
	}
	if err := got.findZeros(r.memory); err != nil {
		return err
	}
	if err := l.Clear(ctx); err != nil {
		return err
	}
	host := report.Look(ctx)
	head := fmt.Sprintf(`# The order in which a clone of nginx touches its memory, from its load until it has answered a request: the page,
# and r or w for a read or a write. Then the runs of pages of zeros that the snapshot has in the same blocks of 2 MiB.
# Recorded with go run ./bench/pages -record FILE: QEMU %s with %s, a guest of 512 MiB.
`, host.QEMU, host.Accel)
	fmt.Printf("%d pages were touched\n", len(got.touches))
	return os.WriteFile(path, []byte(head+got.String()), 0o644)
}

// recorder is a page server, and what starts it, for one clone.
type recorder struct {
	mu      sync.Mutex
	touches []touch // guarded by mu
	failed  error   // guarded by mu

	config   supervisor.PageServerConfig
	memory   *os.File
	template *os.File
	listener *net.UnixListener
	work     sync.WaitGroup
	done     chan struct{} // never closed
}

// Launch implements [supervisor.PageServers].
func (r *recorder) Launch(_ context.Context, c supervisor.PageServerConfig) (supervisor.PageServer, error) {
	r.config, r.done = c, make(chan struct{})
	var err error
	if r.memory, err = os.Open(c.Memory); err != nil {
		return nil, err
	}
	// It stays empty: each page is copied, so that each first access is seen.
	fd, err := unix.MemfdCreate("recorder", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	r.template = os.NewFile(uintptr(fd), "template")
	if err := r.template.Truncate(c.Size); err != nil {
		return nil, err
	}
	r.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: r.Socket(), Net: "unix"})
	if err != nil {
		return nil, err
	}
	r.work.Go(func() { r.fail(r.serve()) })
	return r, nil
}

// Adopt implements [supervisor.PageServers].
func (r *recorder) Adopt(context.Context, json.RawMessage, func(json.RawMessage)) (supervisor.PageServer, error) {
	return nil, errors.New("there is nothing to adopt")
}

func (r *recorder) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = errors.Join(r.failed, err)
}

func (r *recorder) result() (recording, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return recording{touches: slices.Clone(r.touches)}, r.failed
}

// serve answers the faults of the one VMM that connects.
func (r *recorder) serve() error {
	conn, err := r.listener.AcceptUnix()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	fd, vmm, mappings, err := receiveVMM(conn)
	if err != nil {
		return err
	}
	defer fd.Close()
	defer unix.Close(vmm)
	var buf uffd.Buffer
	var waiting []uffd.Event
	for !ended(vmm, fd) {
		// To the end, as in the page server: while a REMOVE waits, no page is taken.
		for {
			events, err := fd.ReadEvents(&buf)
			if err != nil {
				return err
			}
			if len(events) == 0 {
				break
			}
			waiting = append(waiting, events...)
		}
		again := waiting[:0]
		for _, e := range waiting {
			if e.Type != uffd.EventPageFault {
				continue
			}
			switch err := r.answer(fd, mappings, e); {
			case errors.Is(err, uffd.ErrAgain):
				again = append(again, e)
			case errors.Is(err, uffd.ErrGone):
				return nil
			case err != nil:
				return err
			}
		}
		waiting = again
	}
	return nil
}

// ended waits for faults, at most for a moment, and tells whether the VMM has ended.
func ended(vmm int, f *uffd.FD) (over bool) {
	err := f.Use(func(fd int) error {
		p := []unix.PollFd{{Fd: int32(vmm), Events: unix.POLLIN}, {Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(p, 1)
		over = err == nil && p[0].Revents != 0
		return nil
	})
	return over || err != nil
}

// answer copies the page, and notes it.
func (r *recorder) answer(fd *uffd.FD, mappings []pageserver.Mapping, e uffd.Event) error {
	addr := e.Address &^ (pageSize - 1)
	for _, m := range mappings {
		if addr < m.Addr || addr >= m.Addr+m.Size {
			continue
		}
		off := int64(addr - m.Addr + m.Offset)
		page := make([]byte, pageSize)
		if _, err := r.memory.ReadAt(page, off); err != nil {
			return err
		}
		_, err := fd.Copy(addr, page)
		if errors.Is(err, uffd.ErrExist) {
			return fd.Wake(addr, pageSize)
		}
		if err == nil {
			r.note(touch{page: uint32(off / pageSize), write: e.Write})
		}
		return err
	}
	return fmt.Errorf("fault at %#x, which is in no region", addr)
}

// note adds a touch, unless the page comes again because it was given back.
func (r *recorder) note(t touch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, other := range r.touches {
		if other.page == t.page {
			return
		}
	}
	r.touches = append(r.touches, t)
}

// receiveVMM shakes hands, and returns the userfaultfd and the VMM's pidfd. Who
// connects is the supervisor of this process, so what it sends is right.
func receiveVMM(conn *net.UnixConn) (fd *uffd.FD, vmm int, mappings []pageserver.Mapping, err error) {
	body, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(8))
	n, oobn, _, _, err := conn.ReadMsgUnix(body, oob)
	if err != nil {
		return nil, 0, nil, err
	}
	if err := json.Unmarshal(body[:n], &mappings); err != nil {
		return nil, 0, nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return nil, 0, nil, fmt.Errorf("%d control messages came with the handshake: %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 2 {
		return nil, 0, nil, fmt.Errorf("%d descriptors came with the handshake: %w", len(fds), err)
	}
	fd, err = uffd.FromFD(fds[0])
	return fd, fds[1], mappings, err
}

// PID and what follows implement [supervisor.PageServer].
func (r *recorder) PID() int { return os.Getpid() }

func (r *recorder) Handle() (json.RawMessage, error) { return json.RawMessage(`{}`), nil }

func (r *recorder) Socket() string { return filepath.Join(r.config.Runtime, "record.sock") }

func (r *recorder) Template() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", r.template.Fd()))
}

func (r *recorder) Stats(context.Context) (supervisor.PageServerStats, error) {
	return supervisor.PageServerStats{}, nil
}

func (r *recorder) Record(context.Context, int, bool) error { return nil }
func (r *recorder) Upgrade(context.Context) (bool, error)   { return false, nil }
func (r *recorder) Failure(int) string                      { return "" }
func (r *recorder) Done() <-chan struct{}                   { return r.done }
func (r *recorder) Err() error                              { return nil }

func (r *recorder) Stop(context.Context) error {
	r.listener.Close()
	r.work.Wait()
	return errors.Join(r.memory.Close(), r.template.Close())
}

func (r *recorder) Release() { _ = r.Stop(context.Background()) }
