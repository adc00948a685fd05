package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
	"fcvm/internal/vmm/firecracker/jail"
	"fcvm/internal/vmm/instance"
	"fcvm/internal/vmm/vmlog"
)

// vm is a running Firecracker.
type vm struct {
	*instance.VM

	mu       sync.Mutex    // guards what follows
	client   *fcapi.Client // nil before the first request of an adopted VM
	released bool
	saved    bool // the device state was, since the VM was paused
}

var _ vmm.VM = (*vm)(nil)

// Pause implements [vmm.VM].
func (v *vm) Pause(ctx context.Context) error {
	return v.do(ctx, func(c *fcapi.Client) error { return c.SetState(ctx, fcapi.Paused) })
}

// Resume implements [vmm.VM]. The guest's connections to its host may end.
func (v *vm) Resume(ctx context.Context) error {
	return v.do(ctx, func(c *fcapi.Client) error {
		// Whoever resumes what runs must not be a second one.
		i, err := c.Instance(ctx)
		if err != nil || i.State == fcapi.Running {
			return err
		}
		if c.Version().ResumeStopsVsock() && !v.wasSaved() {
			// What such a Firecracker then waits for comes with a snapshot.
			path := filepath.Join(v.Handle().Runtime, resumeState)
			_ = os.Remove(path) // of one that was interrupted
			err := v.saveState(ctx, c, path)
			_ = os.Remove(path)
			if err != nil {
				return fmt.Errorf("resume: %w", err)
			}
		}
		if err := c.SetState(ctx, fcapi.Resumed); err != nil {
			return err
		}
		v.setSaved(false)
		return nil
	})
}

// wasSaved tells whether the device state was saved since the VM was paused, as
// far as this process knows.
func (v *vm) wasSaved() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.saved
}

func (v *vm) setSaved(saved bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.saved = saved
}

// Publish implements [vmm.VM].
func (v *vm) Publish(ctx context.Context, ports []vmm.Port) error {
	if v.Net != nil {
		return v.Gone(v.Net.Publish(ctx, ports))
	}
	var err error
	if len(ports) > 0 {
		err = vmm.ErrNoNetwork
	}
	select {
	case <-v.Proc.Done():
		return errors.Join(vmm.ErrGone, err)
	default:
		return err
	}
}

const (
	// noFile can be opened by nobody.
	noFile = "/dev/null/no-memory"
	// stateNoise is what Firecracker logs each time about noFile.
	stateNoise = "Cannot perform open on the memory backing file"
	// resumeState is in [vmm.Place.Runtime], for a moment.
	resumeState = "resume.state"
	// jailedSave is in the root of a jail, for a moment.
	jailedSave = "save.state"
	// maxState bounds the device state of a jailed VM, in bytes. It has some 20 KiB.
	maxState = 64 << 20
)

// SaveState implements [vmm.VM].
func (v *vm) SaveState(ctx context.Context, path string) error {
	err := v.do(ctx, func(c *fcapi.Client) error { return v.saveState(ctx, c, path) })
	if err == nil {
		v.setSaved(true)
	}
	return err
}

// saveState has the state written where Firecracker can write, and puts it at path.
func (v *vm) saveState(ctx context.Context, c *fcapi.Client, path string) error {
	if v.Handle().Root == "" {
		return saveState(ctx, c, path, path)
	}
	f, err := jail.NewFile(v.Handle().Root, jailedSave)
	if err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	defer f.Close()
	if err := saveState(ctx, c, jailedSave, filepath.Join(v.Handle().Root, jailedSave)); err != nil {
		return err
	}
	// What has this name now may be anything. What is open is what was made.
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	n, err := io.Copy(out, io.LimitReader(f, maxState+1))
	if err == nil && (n == 0 || n > maxState) {
		err = fmt.Errorf("firecracker wrote %d bytes", n)
	}
	if err = errors.Join(err, out.Close(), os.Remove(f.Name())); err != nil {
		return errors.Join(fmt.Errorf("save device state: %w", err), os.Remove(path))
	}
	return nil
}

// saveState writes the device state alone, for which Firecracker has no request.
// It writes that first, syncs it, and then opens the file for the memory: where that
// fails, the state is complete, no memory was read, and the VM is as before
// (create_snapshot in persist.rs, 1.7 to 1.16). A full snapshot of a clone that got its file,
// by contrast, would fetch every page of it. It is Full because before 1.13 a Diff is refused
// without track_dirty_pages.
//
// path is what Firecracker calls the file, and seen what this process does.
func saveState(ctx context.Context, c *fcapi.Client, path, seen string) error {
	if path == seen {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("save device state: %w", err)
		}
		_ = f.Close()
	}
	err := c.CreateSnapshot(ctx, fcapi.SnapshotCreate{Type: fcapi.Full, StateFile: path, MemoryFile: noFile})
	var refused *fcapi.Error
	switch {
	case err == nil:
		err = fmt.Errorf("firecracker wrote memory to %s", noFile)
	case errors.As(err, &refused) && strings.Contains(refused.Fault, stateNoise):
		err = nil
		if info, statErr := os.Lstat(seen); statErr != nil || info.Size() == 0 {
			err = errors.Join(errors.New("firecracker wrote nothing"), statErr)
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("save device state: %w", err), os.Remove(seen))
	}
	return nil
}

// DialAgent implements [vmm.VM].
func (v *vm) DialAgent(ctx context.Context) (net.Conn, error) {
	dial := func(ctx context.Context) (net.Conn, error) { return dialVMM(ctx, v.Handle(), vsockSocket) }
	conn, err := dialGuest(ctx, dial, agentPort, v.Proc.Done())
	if err != nil {
		return nil, v.Gone(fmt.Errorf("connect to the agent: %w", err))
	}
	return conn, nil
}

// Balloon implements [vmm.VM].
func (v *vm) Balloon(ctx context.Context, guestBytes int64) error {
	var all int64
	for _, r := range v.Handle().Regions {
		all += r.Size
	}
	return v.do(ctx, func(c *fcapi.Client) error { return c.Inflate(ctx, max(0, all-guestBytes)>>20) })
}

// Release implements [vmm.VM].
func (v *vm) Release() error {
	v.mu.Lock()
	c := v.client
	v.client, v.released = nil, true
	v.mu.Unlock()
	if c != nil {
		c.Close()
	}
	return v.VM.Release()
}

// Tail implements [vmm.VM].
func (v *vm) Tail() string { return logs(v.Handle().Dir) }

// logs returns the end of what Firecracker and the guest's console printed.
func logs(dir string) string {
	var parts []string
	for _, log := range []struct {
		name  string
		lines int
	}{{vmmLog, 8}, {consoleLog, 12}} {
		if t := vmlog.Tail(filepath.Join(dir, log.name), 0, log.lines, stateNoise); t != "" {
			parts = append(parts, t)
		}
	}
	return strings.Join(parts, "\n")
}

// do makes a request.
func (v *vm) do(ctx context.Context, request func(*fcapi.Client) error) error {
	c, err := v.connection(ctx)
	if err == nil {
		err = request(c)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: firecracker hangs; the end of its log and the guest's console:\n%s", err, v.Tail())
	}
	return v.Gone(err)
}

func (v *vm) connection(ctx context.Context) (*fcapi.Client, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.released {
		return nil, errors.New("the VM was released")
	}
	if v.client == nil {
		c, err := fcapi.New(ctx, func(ctx context.Context) (net.Conn, error) { return dialVMM(ctx, v.Handle(), apiSocket) })
		if err != nil {
			return nil, err
		}
		v.client = c
	}
	return v.client, nil
}
