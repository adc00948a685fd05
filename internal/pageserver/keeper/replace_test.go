//go:build linux

package keeper

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/pstest"
)

// connect starts a VMM whose memory k serves.
func connect(t testing.TB, k *Keeper, shape pstest.Shape, threads int) *pstest.VMM {
	t.Helper()
	template, err := k.Template()
	if err != nil {
		t.Fatal(err)
	}
	defer template.Close()
	v, err := pstest.StartVMM(t.Context(), pstest.Config{
		Shape: shape, Threads: threads, Regions: []pstest.Region{{Size: k.config.Size}},
	}, template)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Kill)
	if err := v.Connect(pstest.Handshake{Socket: k.Socket()}); err != nil {
		t.Fatal(err)
	}
	return v
}

func run(t testing.TB, v *pstest.VMM, threads ...[]pstest.Op) {
	t.Helper()
	r, err := v.Run(pstest.Script{Threads: threads})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range r.Wrong() {
		t.Error(w)
	}
}

// sessions waits until the page server serves n guests.
func sessions(t testing.TB, k *Keeper, n int) []pageserver.SessionStats {
	t.Helper()
	for range 10_000 {
		if st, err := k.Stats(t.Context()); err == nil && len(st.Sessions) == n {
			return st.Sessions
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("there are not %d sessions", n)
	return nil
}

var snapshotPages = pstest.Expect{Snapshot: true}

// shapes runs a test for both kinds of memory.
func shapes(t *testing.T, test func(t *testing.T, shape pstest.Shape, policy pageserver.Policy)) {
	t.Run("anonymous", func(t *testing.T) { test(t, pstest.Anonymous, pageserver.PolicyCopy) })
	t.Run("template", func(t *testing.T) { test(t, pstest.Template, pageserver.PolicyShare) })
}

// Whenever the page server is killed, its clones go on, with the right content:
// also what was given back, before and after.
func TestKilledAnywhere(t *testing.T) {
	shapes(t, func(t *testing.T, shape pstest.Shape, policy pageserver.Policy) {
		k := start(t, testConfig(t, policy))
		const threads = 4
		v := connect(t, k, shape, threads)
		sessions(t, k, 1)

		stop := make(chan struct{})
		var killer sync.WaitGroup
		killer.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(rand.Int64N(int64(200 * time.Millisecond)))):
					_ = syscall.Kill(k.PID(), syscall.SIGKILL)
				}
			}
		})
		removed := pstest.Expect{Zero: true, Snapshot: shape == pstest.Template}
		const rounds = 60
		work := make([][]pstest.Op, threads)
		for i := range work {
			own := pstest.Range(i*testPages/threads, testPages/threads)
			ops := []pstest.Op{{Kind: pstest.Check, Pages: own, Expect: snapshotPages}}
			for range rounds {
				ops = append(ops,
					pstest.Op{Kind: pstest.Remove, Pages: own}, pstest.Op{Kind: pstest.Check, Pages: own, Expect: removed},
					pstest.Op{Kind: pstest.Fill, Pages: own, Version: 1}, pstest.Op{Kind: pstest.Check, Pages: own, Expect: pstest.Expect{Clone: 1, Version: 1}},
					pstest.Op{Kind: pstest.Sleep, Wait: 10 * time.Millisecond},
				)
			}
			work[i] = ops
		}
		run(t, v, work...)
		close(stop)
		killer.Wait()
		if h := k.Handovers(); h.Count == 0 {
			t.Error("the page server was never replaced")
		} else {
			t.Logf("%d handovers, the longest took %v", h.Count, h.Longest)
		}
		if st := sessions(t, k, 1)[0]; st.Handovers == 0 || st.Faults == 0 || st.RemovedPages != testPages {
			t.Errorf("the counters did not outlive the page server: %+v", st)
		}
	})
}

// A page server that stands still while a page is given back, and is killed then,
// has read the event, or its successor does.
func TestKilledWithEventsUnread(t *testing.T) {
	shapes(t, func(t *testing.T, shape pstest.Shape, policy pageserver.Policy) {
		k := start(t, testConfig(t, policy))
		v := connect(t, k, shape, 3)
		sessions(t, k, 1)
		pid := k.PID()
		page := pstest.Page(7)
		killed := make(chan struct{})
		go func() {
			defer close(killed)
			time.Sleep(100 * time.Millisecond) // let the threads get to where they wait
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}()
		run(t, v,
			[]pstest.Op{
				{Kind: pstest.Fill, Pages: page, Version: 3}, {Kind: pstest.Freeze, PID: pid}, {Kind: pstest.Barrier},
				{Kind: pstest.Remove, Pages: page}, {Kind: pstest.Check, Pages: page, Expect: pstest.Expect{Zero: true, Snapshot: shape == pstest.Template}},
			},
			[]pstest.Op{{Kind: pstest.Barrier}, {Kind: pstest.Check, Pages: pstest.Page(100), Expect: snapshotPages}},
			[]pstest.Op{{Kind: pstest.Barrier}, {Kind: pstest.Fill, Pages: pstest.Page(200), Version: 1}, {Kind: pstest.Check, Pages: pstest.Page(200), Expect: pstest.Expect{Clone: 1, Version: 1}}},
		)
		<-killed
	})
}

// A keeper that ends leaves all to the next one, which can replace the page server
// as if it had been there from the start.
func TestAdopt(t *testing.T) {
	shapes(t, func(t *testing.T, shape pstest.Shape, policy pageserver.Policy) {
		c := testConfig(t, policy)
		first, err := Start(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		v := connect(t, first, shape, 1)
		sessions(t, first, 1)
		run(t, v, []pstest.Op{{Kind: pstest.Fill, Pages: pstest.Range(0, 64), Version: 1}, {Kind: pstest.Remove, Pages: pstest.Range(32, 64)}})
		first.Release()

		// Nobody keeps it, and it serves.
		run(t, v, []pstest.Op{{Kind: pstest.Check, Pages: pstest.Range(100, 20), Expect: snapshotPages}})

		var mu sync.Mutex
		var handles []Handle
		second, err := Adopt(t.Context(), first.Handle(), func(h Handle) {
			mu.Lock()
			defer mu.Unlock()
			handles = append(handles, h)
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := second.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		}()
		old := second.PID()
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		run(t, v, []pstest.Op{
			{Kind: pstest.Check, Pages: pstest.Range(0, 32), Expect: pstest.Expect{Clone: 1, Version: 1}},
			{Kind: pstest.Check, Pages: pstest.Range(32, 64), Expect: pstest.Expect{Zero: true, Snapshot: shape == pstest.Template}},
			{Kind: pstest.Check, Pages: pstest.Range(200, 100), Expect: snapshotPages},
		})
		mu.Lock()
		defer mu.Unlock()
		if len(handles) != 1 || handles[0].PID == old || handles[0].PID != second.PID() {
			t.Errorf("told of %+v", handles)
		}
		// Further VMs find the same socket.
		run(t, connect(t, second, shape, 1), []pstest.Op{{Kind: pstest.Check, Pages: pstest.Range(0, 300), Expect: snapshotPages}})
		sessions(t, second, 2)
	})
}

// A page server that runs is replaced by another program, and nobody is lost.
func TestUpgrade(t *testing.T) {
	shapes(t, func(t *testing.T, shape pstest.Shape, policy pageserver.Policy) {
		c := testConfig(t, policy)
		k := start(t, c)
		v := connect(t, k, shape, 2)
		sessions(t, k, 1)
		newer := c.Dir + "/newer"
		if err := os.Link(c.Binary, newer); err != nil {
			b, err := os.ReadFile(c.Binary)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(newer, b, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan error, 1)
		go func() {
			for range 5 {
				if err := k.Upgrade(t.Context(), newer); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		all := pstest.Range(0, testPages)
		for range 5 {
			run(t, v, []pstest.Op{{Kind: pstest.Check, Pages: all, Expect: pstest.Expect{Snapshot: true, Zero: true}}, {Kind: pstest.Remove, Pages: pstest.Range(0, 512)}},
				[]pstest.Op{{Kind: pstest.Check, Pages: all, Expect: pstest.Expect{Snapshot: true, Zero: true}}})
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", k.PID())); err != nil || exe != newer {
			t.Errorf("it is %s, %v", exe, err)
		}
		if h := k.Handovers(); h.Count != 5 {
			t.Errorf("%d handovers, want 5", h.Count)
		}
		if err := k.Upgrade(t.Context(), "/nonexistent"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
		sessions(t, k, 1)
	})
}

// A VMM whose handshake the page server refuses is ended, and the reason kept.
func TestRefusedGuestIsEnded(t *testing.T) {
	k := start(t, testConfig(t, pageserver.PolicyCopy))
	v, err := pstest.StartVMM(t.Context(), pstest.Config{
		Shape: pstest.Anonymous, Regions: []pstest.Region{{Offset: k.config.Size, Size: 1 << 20}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Kill)
	pid := v.PID()
	if err := v.Connect(pstest.Handshake{Socket: k.Socket()}); err != nil {
		t.Fatal(err)
	}
	if how, err := v.Ended(30 * time.Second); err != nil || !strings.Contains(how, "killed") {
		t.Fatalf("VMM: %s, %v", how, err)
	}
	for range 1000 {
		if k.Failure(pid) != "" {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if reason := k.Failure(pid); !strings.Contains(reason, "behind the memory file") {
		t.Errorf("the reason is %q", reason)
	}
}
