package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/instance"
	"fcvm/internal/vmm/qemu/qmp"
)

// vm is a running QEMU.
type vm struct {
	*instance.VM

	mu       sync.Mutex  // guards what follows
	client   *qmp.Client // nil before the first command of an adopted VM
	agent    net.Conn    // made before QEMU was started, for the first DialAgent
	released bool
}

var _ vmm.VM = (*vm)(nil)

// Pause implements [vmm.VM].
func (v *vm) Pause(ctx context.Context) error { return v.do(ctx, "stop", nil, nil) }

// Resume implements [vmm.VM].
func (v *vm) Resume(ctx context.Context) error { return v.do(ctx, "cont", nil, nil) }

// SaveState implements [vmm.VM]. The command is Xen's, but needs no Xen: it
// writes every device and no memory, in under 2 ms.
func (v *vm) SaveState(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	_ = f.Close()
	err = v.do(ctx, "xen-save-devices-state", map[string]any{"filename": path, "live": false}, nil)
	if err == nil {
		var info os.FileInfo
		if info, err = os.Stat(path); err == nil && info.Size() == 0 {
			err = errors.New("QEMU wrote nothing")
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("save device state: %w", err), os.Remove(path))
	}
	return nil
}

// DialAgent implements [vmm.VM]. The kernel closes QEMU's sockets up to a
// millisecond after it has told of QEMU's end, so that is asked for first.
func (v *vm) DialAgent(ctx context.Context) (net.Conn, error) {
	select {
	case <-v.Proc.Done():
		return nil, fmt.Errorf("connect to the agent: %w", vmm.ErrGone)
	default:
	}
	v.mu.Lock()
	first := v.agent
	v.agent = nil
	v.mu.Unlock()
	if first != nil {
		return first, nil
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(v.Handle().Runtime, agentSocket))
	if err != nil {
		return nil, v.Gone(fmt.Errorf("connect to the agent: %w", err))
	}
	return conn, nil
}

// Balloon implements [vmm.VM].
func (v *vm) Balloon(ctx context.Context, guestBytes int64) error {
	return v.do(ctx, "balloon", map[string]any{"value": guestBytes}, nil)
}

// Release implements [vmm.VM].
func (v *vm) Release() error {
	v.mu.Lock()
	c := v.client
	v.client, v.released = nil, true
	agent := v.agent
	v.agent = nil
	v.mu.Unlock()
	if agent != nil {
		_ = agent.Close()
	}
	if c != nil {
		_ = c.Close()
	}
	return v.VM.Release()
}

// Tail implements [vmm.VM].
func (v *vm) Tail() string { return logs(v.Handle().Dir) }

// do gives QEMU a command.
func (v *vm) do(ctx context.Context, command string, args, result any) error {
	c, err := v.connection(ctx)
	if err != nil {
		return v.Gone(err)
	}
	err = c.Do(ctx, command, args, result)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: QEMU hangs; the end of its log and the guest's console:\n%s", err, v.Tail())
	}
	return v.Gone(err)
}

// connection returns the one to QMP, anew where it was lost or an adopted VM
// has none yet.
func (v *vm) connection(ctx context.Context) (*qmp.Client, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.released {
		return nil, errors.New("the VM was released")
	}
	if v.client != nil {
		select {
		case <-v.client.Done():
		default:
			return v.client, nil
		}
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(v.Handle().Runtime, qmpSocket))
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU's socket: %w", err)
	}
	c, err := qmp.New(ctx, conn, nil)
	if err != nil {
		return nil, err
	}
	v.client = c
	return c, nil
}
