//go:build linux

package main

import (
	"context"
	"slices"
	"time"

	"fcvm/internal/api"
)

// settleTime bounds the wait for what an interrupted command leaves behind.
const settleTime = 10 * time.Second

// settle returns when no VM is left that was begun by a request which was
// interrupted: the supervisor notices that its client left, and then needs a
// moment. Who pressed Ctrl-C expects to find nothing.
func (a *app) settle(ctx context.Context, c *api.Client, ours func(api.VM) bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		vms, err := c.List(ctx)
		switch {
		case ctx.Err() != nil:
			a.ui.Warn("what was interrupted is not undone yet; `fcvm ls -a` shows it")
			return
		case err != nil || !slices.ContainsFunc(vms, ours):
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}
