package qemu

import (
	"context"
	"fmt"
	"strings"

	"fcvm/internal/vmm"
)

// Publish implements [vmm.VM].
func (v *vm) Publish(ctx context.Context, ports []vmm.Port) error {
	if v.Net != nil {
		return v.Gone(v.Net.Publish(ctx, ports))
	}
	for i, p := range ports {
		if err := v.publish(ctx, p); err != nil {
			v.withdraw(context.WithoutCancel(ctx), ports[:i])
			return err
		}
	}
	return nil
}

func (v *vm) publish(ctx context.Context, p vmm.Port) error {
	rule, err := forward(p)
	if err != nil {
		return fmt.Errorf("publish port %d: %w", p.HostPort, err)
	}
	said, err := v.monitor(ctx, "hostfwd_add net "+rule)
	if err != nil {
		return fmt.Errorf("publish port %d/%s: %w", p.HostPort, p.Proto, err)
	}
	if said == "" {
		return nil
	}
	if err := explainPort([]vmm.Port{p}, said); err != nil {
		return err
	}
	return fmt.Errorf("publish port %d/%s: QEMU says %.200q", p.HostPort, p.Proto, said)
}

// withdraw takes back the ports of a request whose next one failed.
func (v *vm) withdraw(ctx context.Context, ports []vmm.Port) {
	for _, p := range ports {
		if rule, err := forward(p); err == nil {
			host, _, _ := strings.Cut(rule, "-:")
			_, _ = v.monitor(ctx, "hostfwd_remove net "+host)
		}
	}
}

// monitor gives a command that QMP has no word for, to the monitor for people,
// and returns what that said.
func (v *vm) monitor(ctx context.Context, line string) (string, error) {
	var said string
	err := v.do(ctx, "human-monitor-command", map[string]any{"command-line": line}, &said)
	return strings.TrimSpace(said), err
}
