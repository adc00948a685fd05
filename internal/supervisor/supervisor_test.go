package supervisor

import (
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fcvm/internal/api"
)

func TestOnlyOneSupervisor(t *testing.T) {
	b := newBench(t)
	err := Run(t.Context(), b.opts())
	if e := apiError(t, err, api.CodeConflict); !strings.Contains(e.Message, "pid") {
		t.Errorf("message: %s", e.Message)
	}
	if _, err := b.c.Info(t.Context()); err != nil {
		t.Errorf("the first one no longer answers: %v", err)
	}
}

func TestOnDemandEnds(t *testing.T) {
	b := idleBench(t)
	b.options = func(o *Options) { o.OnDemand, o.IdleTimeout = true, 20*time.Millisecond }
	done := make(chan error, 1)
	go func() { done <- Run(t.Context(), b.opts()) }()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.layout.Runtime); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the runtime directory is left: %v", err)
	}
	b.options = nil
	b.start() // and made again
}

// TestOnDemandStaysForVMsAndClients: with either, it does not end.
func TestOnDemandStaysForVMsAndClients(t *testing.T) {
	// Long enough for the first client to connect on a busy machine.
	const idle = 500 * time.Millisecond
	b := idleBench(t)
	b.options = func(o *Options) { o.OnDemand, o.IdleTimeout = true, idle }
	b.start()
	time.Sleep(2 * idle)
	b.run("vm", "sleep")
	if err := b.c.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * idle)
	if _, err := b.c.Get(t.Context(), "vm"); err != nil {
		t.Errorf("supervisor left its VM: %v", err)
	}
}

// TestSupervisorsTakeTurns: each removes the lock file when it leaves, and never
// do two hold it.
func TestSupervisorsTakeTurns(t *testing.T) {
	b := idleBench(t)
	var holders atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				f, err := acquire(t.Context(), b.layout)
				if err != nil {
					t.Error(err)
					return
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d hold the lock", n)
				}
				holders.Add(-1)
				leave(f, b.layout)
			}
		})
	}
	wg.Wait()
}
