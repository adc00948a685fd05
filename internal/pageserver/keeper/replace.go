//go:build linux

package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"fcvm/internal/pageserver"
)

const (
	// A page server that died so many times in so short a time, that is nearly as soon
	// as it was started, dies of something that a successor does not mend.
	deathsAtMost = 100
	deathsWithin = 10 * time.Second
	// startsAtMost is how often a successor may fail to start, one after another.
	startsAtMost = 5
)

// watch replaces page servers that end.
func (k *Keeper) watch() {
	var deaths []time.Time
	for {
		p := k.current()
		select {
		case <-p.Done():
		case <-k.life.Done():
			return
		}
		if k.life.Err() != nil {
			return
		}
		began := time.Now()
		deaths = append(deaths, began)
		for began.Sub(deaths[0]) > deathsWithin {
			deaths = deaths[1:]
		}
		err := p.err()
		if len(deaths) > deathsAtMost {
			err = fmt.Errorf("it died %d times within %v, the last time so: %w", len(deaths), deathsWithin, err)
		} else {
			k.log.Warn("page server ended, and is replaced", "pid", p.PID(), "error", err)
			err = k.replace(p)
		}
		if k.life.Err() != nil {
			return
		}
		if err != nil {
			k.log.Error("page server cannot be replaced", "error", err)
			k.mu.Lock()
			k.gaveUp = err
			k.mu.Unlock()
			close(k.done)
			return
		}
		took := time.Since(began)
		k.mu.Lock()
		k.handovers.Count++
		k.handovers.Last = took
		k.handovers.Longest = max(k.handovers.Longest, took)
		n := len(k.guests)
		k.mu.Unlock()
		k.log.Info("page server was replaced", "pid", k.PID(), "guests", n, "took", took)
	}
}

// replace starts a successor of old, which has ended, and hands it all guests.
func (k *Keeper) replace(old *process) error {
	k.serving.Lock()
	defer k.serving.Unlock()
	old.release()
	p, err := k.relaunch()
	if err != nil {
		return err
	}
	k.mu.Lock()
	k.proc = p
	guests := make([]*pageserver.Guest, 0, len(k.guests))
	for _, g := range k.guests {
		guests = append(guests, g)
	}
	k.mu.Unlock()
	if k.config.Replaced != nil {
		// On record before it serves: else a supervisor that dies now would look
		// for the old one, and take the VMs for lost.
		k.config.Replaced(k.handle(p))
	}
	for _, g := range guests {
		// Whoever was handed over may have been served, even if no answer came.
		g.Served = true
		if err := k.serve(g); err != nil {
			k.log.Error("VM is lost in the handover", "pid", g.PID, "error", err)
		}
	}
	return nil
}

// relaunch starts a page server that goes on with the template.
func (k *Keeper) relaunch() (*process, error) {
	var errs []error
	for wait := 10 * time.Millisecond; len(errs) < startsAtMost; wait *= 2 {
		p, err := launch(k.life, &k.config, k.template, true)
		if err == nil {
			return p, nil
		}
		errs = append(errs, err)
		select {
		case <-k.life.Done():
			return nil, k.life.Err()
		case <-time.After(wait):
		}
	}
	return nil, fmt.Errorf("%d starts failed, the last one so: %w", len(errs), errs[len(errs)-1])
}

// Upgrade replaces the page server by one of another program, under running VMs,
// by the same way as when it dies. It returns when the successor serves.
func (k *Keeper) Upgrade(ctx context.Context, binary string) error {
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("upgrade page server: %w", err)
	}
	k.serving.Lock()
	k.config.Binary = binary
	p := k.current()
	err := p.client.Shutdown(ctx)
	k.serving.Unlock()
	if err != nil && !errors.Is(err, ErrReleased) {
		return fmt.Errorf("upgrade page server: %w", err)
	}
	for k.current() == p {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-k.done:
			return fmt.Errorf("upgrade page server: %w", k.Err())
		case <-k.life.Done():
			return fmt.Errorf("upgrade page server: %w", ErrReleased)
		case <-time.After(time.Millisecond):
		}
	}
	// Its guests are handed over under this lock.
	k.serving.Lock()
	defer k.serving.Unlock()
	return nil
}
