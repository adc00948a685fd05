package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/bench/internal/lab"
	"fcvm/bench/internal/report"
	"fcvm/internal/api"
	"fcvm/test/images"
)

// takeover is the state of the section of that name.
type takeover struct {
	b    *bench
	port int
	// checks are patterns that guests verified; clones were started for them.
	checks, clones atomic.Int64
	// pause is the longest standstill that a guest noticed, in milliseconds.
	pause atomic.Int64
	mu    sync.Mutex
	wait  time.Duration // the longest request; guarded by mu
}

// benchTakeover kills the page servers (SIGKILL) at random moments, while clones
// come, verify their memory, take new memory, give it back and go, and tells the longest
// pause. Anything that a guest finds wrong fails it.
func benchTakeover(ctx context.Context, b *bench) error {
	kills := 200
	if b.quick {
		kills = 20
	}
	if err := b.memtest(ctx); err != nil {
		return err
	}
	const lanes = 4
	port, err := lab.FreePorts(lanes)
	if err != nil {
		return err
	}
	t := &takeover{b: b, port: port}
	calm, err := t.run(ctx, lanes, 0)
	if err != nil {
		return fmt.Errorf("without kills: %w", err)
	}
	storm, err := t.run(ctx, lanes, kills)
	if err != nil {
		return fmt.Errorf("with kills: %w", err)
	}
	fmt.Printf("\npage servers killed at random moments, under %d clones that verify their memory, use new memory, come and go\n", lanes)
	fmt.Printf("  without kills: %s\n  with %d kills: %s\n", calm, kills, storm)
	b.Note("takeover", "kills", float64(kills), "")
	b.Note("takeover", "longest pause of a guest", float64(storm.pause), "ms")
	b.Note("takeover", "longest pause of a guest without kills", float64(calm.pause), "ms")
	return b.Clear(ctx)
}

// memtest makes the snapshot "pattern" of a guest whose memory is full of one.
func (b *bench) memtest(ctx context.Context) error {
	cache, err := images.CacheDir()
	if err != nil {
		return err
	}
	base, err := images.Build(ctx, "busybox", cache)
	if err != nil {
		return err
	}
	program := filepath.Join(b.Dir, "memtest")
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "./test/e2e/testprog/memtest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build memtest: %w: %s", err, out)
	}
	img, err := images.AddProgram(base, program, "/memtest")
	if err != nil {
		return err
	}
	layout := filepath.Join(b.Dir, "memtest.oci")
	if err := images.WriteOCI(layout, img, "latest"); err != nil {
		return err
	}
	port, err := lab.FreePorts(1)
	if err != nil {
		return err
	}
	if _, err := b.FCVM(ctx, "run", "-d", "--name", "pattern", "-m", "256m", "-p", fmt.Sprintf("127.0.0.1:%d:8080", port), "--entrypoint", "/memtest", "oci:"+layout); err != nil {
		return err
	}
	if err := lab.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/verify", port)); err != nil {
		return err
	}
	if _, err := b.FCVM(ctx, "snapshot", "create", "pattern", "--name", "pattern"); err != nil {
		return err
	}
	_, err = b.FCVM(ctx, "rm", "-f", "pattern")
	return err
}

// outcome of a run.
type outcome struct {
	clones, checks, handovers int64
	pause                     int64
	wait                      time.Duration
}

func (o outcome) String() string {
	return fmt.Sprintf("%d clones verified their memory %d times, all right; %d page servers replaced; longest standstill of a guest %d ms, longest request %.0f ms",
		o.clones, o.checks, o.handovers, o.pause, report.Millis(o.wait))
}

// run lets clones work until the page servers were killed so many times; with
// none, for ten seconds.
func (t *takeover) run(ctx context.Context, lanes, kills int) (outcome, error) {
	t.checks.Store(0)
	t.clones.Store(0)
	t.pause.Store(0)
	t.wait = 0
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for lane := range lanes {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := t.life(ctx, lane, n); err != nil {
					cancel(fmt.Errorf("clone %d of lane %d: %w", n, lane, err))
					return
				}
			}
		})
	}
	killed, err := t.kill(ctx, kills)
	close(stop)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return outcome{}, cause
	}
	return outcome{clones: t.clones.Load(), checks: t.checks.Load(), handovers: killed, pause: t.pause.Load(), wait: t.wait}, err
}

// life of one clone. Its memory comes from the template in half of the lanes, and as copies
// in the others.
func (t *takeover) life(ctx context.Context, lane, n int) error {
	name := fmt.Sprintf("lane%d-%d", lane, n)
	policy := []string{"share", "copy"}[lane%2]
	port := t.port + lane
	if _, err := t.b.FCVM(ctx, "clone", "--snapshot", "pattern", "--name", name, "--policy", policy, "-p", fmt.Sprintf("127.0.0.1:%d:8080", port)); err != nil {
		return err
	}
	t.clones.Add(1)
	url := func(path string) string { return fmt.Sprintf("http://127.0.0.1:%d/%s", port, path) }
	part := fmt.Sprintf("seed=%d&from=%d&pages=2000", n+1, 500*lane)
	for _, path := range []string{"verify", "churn?pages=8000", "rewrite?" + part, "verify?" + part, "churn?pages=8000", "verify?" + part} {
		begun := time.Now()
		if _, err := lab.Fetch(ctx, url(path)); err != nil {
			return err
		}
		t.mu.Lock()
		t.wait = max(t.wait, time.Since(begun))
		t.mu.Unlock()
		if strings.HasPrefix(path, "verify") {
			t.checks.Add(1)
		}
	}
	pause, err := lab.Fetch(ctx, url("pause"))
	if err != nil {
		return err
	}
	millis, err := strconv.ParseInt(strings.TrimSpace(pause), 10, 64)
	if err != nil {
		return err
	}
	for old := t.pause.Load(); millis > old && !t.pause.CompareAndSwap(old, millis); old = t.pause.Load() {
	}
	_, err = t.b.FCVM(ctx, "rm", "-f", name)
	return err
}

// kill ends page servers at random moments.
func (t *takeover) kill(ctx context.Context, kills int) (killed int64, err error) {
	if kills == 0 {
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
		}
		return 0, nil
	}
	for killed < int64(kills) {
		select {
		case <-ctx.Done():
			return killed, nil // a lane says why
		case <-time.After(time.Duration(rand.Int64N(int64(600 * time.Millisecond)))):
		}
		out, err := t.b.FCVM(ctx, "stats", "--no-stream", "--json")
		if err != nil {
			return killed, err // where a lane failed, its reason is told instead
		}
		var st api.Stats
		if err := json.Unmarshal([]byte(out), &st); err != nil {
			return killed, err
		}
		for _, p := range st.PageServers {
			if killServer(p.PID) {
				killed++
			}
		}
	}
	return killed, nil
}

// killServer kills a page server, unless it has ended meanwhile.
func killServer(pid int) bool {
	// The handle first: what is then looked at is what it kills.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && filepath.Base(exe) == "uffd_handler" && unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}
