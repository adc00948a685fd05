package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"fcvm/internal/datadir"
	"fcvm/test/images"
)

// bench is a data directory of its own, with a guest and an nginx image.
type bench struct {
	bin, dir string
	quick    bool
	image    string
	host     host
	results  []result
}

// result is one measured number.
type result struct {
	Section string  `json:"section"`
	Name    string  `json:"name"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit"`
}

func newBench(ctx context.Context, bin string, quick bool) (*bench, error) {
	dir, err := os.MkdirTemp("", "fcvm-bench")
	if err != nil {
		return nil, err
	}
	b := &bench{bin: bin, dir: dir, quick: quick}
	if err := b.prepare(ctx); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *bench) prepare(ctx context.Context) error {
	cache, err := images.CacheDir()
	if err != nil {
		return err
	}
	img, err := images.Build(ctx, "nginx", cache)
	if err != nil {
		return err
	}
	layout := filepath.Join(b.dir, "nginx")
	if err := images.WriteOCI(layout, img, "latest"); err != nil {
		return err
	}
	b.image = "oci:" + layout
	if _, err := b.fcvm(ctx, "setup"); err != nil {
		return err
	}
	_, err = b.fcvm(ctx, "image", "load", b.image)
	return err
}

// close removes every VM, the supervisor and the directory.
func (b *bench) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := b.clear(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
	}
	_, _ = b.fcvm(ctx, "serve", "--stop")
	if l, err := datadir.Open(filepath.Join(b.dir, "data")); err == nil {
		_ = os.RemoveAll(l.Runtime)
	}
	_ = os.RemoveAll(b.dir)
}

// clear removes all VMs.
func (b *bench) clear(ctx context.Context) error {
	out, err := b.fcvm(ctx, "ls", "-a", "-q")
	if err != nil || out == "" {
		return err
	}
	_, err = b.fcvm(ctx, append([]string{"rm", "-f"}, strings.Fields(out)...)...)
	return err
}

// fcvm runs a command of the CLI and returns its standard output.
func (b *bench) fcvm(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "fcvm"), args...)
	cmd.Env = append(os.Environ(), "FCVM_DATA_DIR="+filepath.Join(b.dir, "data"))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("fcvm %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// timed runs a command of the CLI and returns how long it took, its start and
// end included: what a user waits.
func (b *bench) timed(ctx context.Context, args ...string) (time.Duration, error) {
	start := time.Now()
	_, err := b.fcvm(ctx, args...)
	return time.Since(start), err
}

func (b *bench) note(section, name string, value float64, unit string) {
	b.results = append(b.results, result{section, name, value, unit})
}

// freePorts returns the first of n consecutive TCP ports that are free.
func freePorts(n int) (int, error) {
	for first := 20000; first+n < 32000; first += n {
		if allFree(first, n) {
			return first, nil
		}
	}
	return 0, errors.New("no free ports")
}

func allFree(first, n int) bool {
	for p := first; p < first+n; p++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", p))
		if err != nil {
			return false
		}
		_ = l.Close()
	}
	return true
}

// percentile of durations, by nearest rank.
func percentile(ds []time.Duration, p float64) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(ds))
	i := int(float64(len(s))*p/100+0.9999999) - 1
	return s[max(0, min(i, len(s)-1))]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
