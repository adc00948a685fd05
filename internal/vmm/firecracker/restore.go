package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
	"fcvm/internal/vmm/instance"
	"fcvm/internal/vmm/process"
)

// Restore implements [vmm.Engine].
//
// Where tracing is not allowed, a clone that shares a template fails with an error
// that wraps [vmm.ErrAttach]; the other ways need no tracing.
func (e *Engine) Restore(ctx context.Context, c vmm.RestoreConfig) (_ vmm.VM, err error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	if err := checkMemory(c); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	l, err := e.prepare(ctx, c.Place, c.Machine, c.Ports)
	if err != nil {
		return nil, err
	}
	defer func() { l.close(err != nil) }()
	// How many a clone will take, nobody knows.
	if err := needHugePages(c.Machine, 1); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	if l.jail != nil {
		if err := l.jail.LinkOrCopy(c.State, jailedState); err != nil {
			return nil, fmt.Errorf("restore: %w", err)
		}
		c.State = jailedState
	}
	var regions []vmm.Region
	switch {
	case c.Memory.Backend == vmm.BackendFile:
		path := jailedMemory
		if l.jail == nil {
			path = inherited(l.add(c.Memory.File))
		} else if err := l.jail.Link(c.Memory.File, path); err != nil {
			return nil, fmt.Errorf("restore: %w", err)
		}
		err = l.runAndLoad(ctx, c, fcapi.MemoryBackend{Type: fcapi.File, Path: path})
	case c.Memory.Copied && l.jail != nil:
		l.merge = c.Memory.Merge
		err = l.runRelayed(ctx, c)
	case c.Memory.Copied:
		l.merge = c.Memory.Merge
		err = l.runAndLoad(ctx, c, fcapi.MemoryBackend{Type: fcapi.UFFD, Path: c.Memory.Socket})
	case e.noTrace:
		err = attach.ErrForbidden
	default:
		regions, err = l.runAttached(ctx, c)
	}
	if errors.Is(err, attach.ErrForbidden) {
		return nil, fmt.Errorf("restore: %w: %w", vmm.ErrAttach, err)
	}
	if err != nil {
		return nil, l.explain(ctx, "restore", err)
	}
	if regions == nil {
		// While the guest stands still, nothing of it was given back.
		if regions, err = restoredMemory(l.proc.PID(), pieces(c.MemoryBytes, l.client.Version())); err != nil {
			return nil, fmt.Errorf("restore: %w", err)
		}
	}
	if err := l.publish(ctx); err != nil {
		return nil, err
	}
	if !c.Paused {
		if err := l.client.SetState(ctx, fcapi.Resumed); err != nil {
			return nil, l.explain(ctx, "restore", err)
		}
	}
	v := l.done(regions)
	v.setSaved(c.Paused) // as in the golden VM's pause
	return v, nil
}

func checkMemory(c vmm.RestoreConfig) error {
	switch c.Memory.Backend {
	case vmm.BackendFile, vmm.BackendUFFD:
	default:
		return fmt.Errorf("mem backend %q: want uffd or file", c.Memory.Backend)
	}
	if c.Memory.File == nil {
		return errors.New("no memory file")
	}
	if c.Memory.Merge && !c.Memory.Copied {
		return errors.New("merge pages: only those that are copied can be")
	}
	if c.HugePages && (!c.Memory.Copied || c.Memory.Merge) {
		return errors.New("huge pages have to be copied (policy copy), and are not merged")
	}
	info, err := c.Memory.File.Stat()
	if err != nil {
		return fmt.Errorf("look at memory file: %w", err)
	}
	if info.Size() < c.MemoryBytes {
		return fmt.Errorf("memory file %s has %d of %d bytes: the snapshot is damaged", c.Memory.File.Name(), info.Size(), c.MemoryBytes)
	}
	if _, err := os.Stat(c.State); err != nil {
		return fmt.Errorf("open device state: %w", err)
	}
	return nil
}

// load has Firecracker load the snapshot, and leave the guest paused.
//
// clock_realtime is not used: the agent sets the guest's clock, and its monotonic
// clock should not notice the time that it did not live through.
func (l *launch) load(ctx context.Context, c vmm.RestoreConfig, m fcapi.MemoryBackend) error {
	return l.client.LoadSnapshot(ctx, fcapi.SnapshotLoad{StateFile: c.State, Memory: m})
}

// runAndLoad starts Firecracker, and has it get its memory by itself.
func (l *launch) runAndLoad(ctx context.Context, c vmm.RestoreConfig, m fcapi.MemoryBackend) error {
	if err := l.run(ctx); err != nil {
		return err
	}
	if err := l.connect(ctx); err != nil {
		return err
	}
	return l.load(ctx, c, m)
}

// serverSocket makes a socket that Firecracker inherits and never uses: the end of the
// connection to the page server tells that Firecracker has ended, even when the
// supervisor is no more. It is connected when there is something to send, because the
// page server waits for that only for some time.
func (l *launch) serverSocket(c vmm.RestoreConfig) (*os.File, error) {
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket for the page server: %w", err)
	}
	server := os.NewFile(uintptr(sock), c.Memory.Socket)
	l.add(server)
	return server, nil
}

// runAttached starts Firecracker traced, has it load the snapshot, and gives the
// page server a userfaultfd over what it maps of the template. That happens within
// the load: Firecracker touches the guest's memory before it answers.
func (l *launch) runAttached(ctx context.Context, c vmm.RestoreConfig) ([]vmm.Region, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	server, err := l.serverSocket(c)
	if err != nil {
		return nil, err
	}
	defer server.Close()
	a := attach.Config{Size: c.MemoryBytes, File: c.Memory.File, Own: true, Userfault: true}
	path := jailedMemory
	if l.jail == nil {
		path = inherited(l.add(c.Memory.File))
	} else {
		// The template has no name that could be linked into a jail.
		if a.StandIn, err = l.jail.Make(path, c.MemoryBytes); err != nil {
			return nil, err
		}
		defer a.StandIn.Close()
	}
	l.traced = true
	cmd, err := l.command(ctx)
	if err != nil {
		return nil, err
	}

	var got *attach.Attached
	attached := make(chan struct{}) // closed when it is, or never will be
	var attachErr error
	go func() {
		defer close(attached)
		got, attachErr = l.attach(ctx, cmd, a, server)
	}()
	loadErr := func() error {
		client, err := l.dial(ctx, attached)
		if err != nil {
			return err
		}
		l.client = client
		return l.load(ctx, c, fcapi.MemoryBackend{Type: fcapi.File, Path: path})
	}()
	if loadErr != nil {
		// A load that failed ends Firecracker, and with it what waits for its mapping.
		cancel(loadErr)
	}
	<-attached
	switch {
	case errors.Is(attachErr, attach.ErrForbidden) || attachErr != nil && loadErr == nil:
		return nil, attachErr
	case attachErr != nil && errors.Is(loadErr, fcapi.ErrClosed):
		// It ended by itself, and its log says why; or attaching failed, and ended it.
		return nil, fmt.Errorf("%w: %w", fcapi.ErrClosed, attachErr)
	case loadErr != nil:
		return nil, loadErr
	}
	var regions []vmm.Region
	for _, p := range got.Pieces {
		regions = append(regions, vmm.Region{Addr: p.Addr, Size: int64(p.Size), Offset: int64(p.Offset)})
	}
	return regions, nil
}

// attach starts cmd and returns when the page server answers for its memory.
func (l *launch) attach(ctx context.Context, cmd *exec.Cmd, c attach.Config, server *os.File) (*attach.Attached, error) {
	c.Wrapped = l.net != nil
	a, err := attach.Start(ctx, cmd, c)
	if err != nil {
		return nil, err
	}
	defer a.UFFD.Close()
	if l.proc, err = process.Started(cmd); err != nil {
		return nil, err
	}
	l.closeOwned()
	if err := l.shakeHands(server, a); err != nil {
		// It waits for its first page, for ever.
		return nil, errors.Join(err, l.proc.Kill())
	}
	return a, nil
}

// shakeHands gives the page server the userfaultfd of an attached Firecracker.
func (l *launch) shakeHands(server *os.File, a *attach.Attached) error {
	var mappings []pageserver.Mapping
	for _, p := range a.Pieces {
		mappings = append(mappings, pageserver.Mapping{Addr: p.Addr, Size: p.Size, Offset: p.Offset})
	}
	return a.UFFD.Use(func(fd int) error { return l.handOver(server, fd, mappings) })
}

// handOver connects a socket of [launch.serverSocket], and gives the page server a
// userfaultfd.
func (l *launch) handOver(server *os.File, uffd int, mappings []pageserver.Mapping) error {
	if err := unix.Connect(int(server.Fd()), &unix.SockaddrUnix{Name: server.Name()}); err != nil {
		return fmt.Errorf("connect to the page server: %w", err)
	}
	conn, err := net.FileConn(server)
	if err != nil {
		return fmt.Errorf("connect to the page server: %w", err)
	}
	defer conn.Close()
	return instance.HandOver(conn.(*net.UnixConn), l.proc, uffd, mappings)
}
