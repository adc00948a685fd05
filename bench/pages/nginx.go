//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"text/tabwriter"
	"time"

	"fcvm/bench/internal/lab"
	"fcvm/internal/api"
)

// benchNginx counts the faults of real clones that answer a request: of the first
// one, and of the next one after a page server that replayed what the first one
// waited for.
func benchNginx(ctx context.Context, b *bench) error {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		fmt.Println("skipped: a real guest needs qemu-system-x86_64")
		return nil
	}
	l, err := lab.New(ctx, b.bin)
	if err != nil {
		return err
	}
	defer l.Close()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "policy\tfaults without replay\twith\tfewer %")
	policies := []string{"share", "copy"}
	// Each has a snapshot of its own, and so a working set.
	if err := snapshotNginx(ctx, l, policies); err != nil {
		return err
	}
	for _, policy := range policies {
		without, err := nginxFaults(ctx, l, policy)
		if err != nil {
			return err
		}
		with, err := nginxFaults(ctx, l, policy)
		if err != nil {
			return err
		}
		fewer := 100 * (1 - float64(with)/float64(without))
		fmt.Fprintf(w, "%s\t%d\t%d\t%.1f\n", policy, without, with, fewer)
		b.Note("nginx", policy+"; faults without replay", float64(without), "")
		b.Note("nginx", policy+"; faults with replay", float64(with), "")
		b.atLeast(90, fewer, "% fewer faults of a real nginx clone with replay, "+policy)
	}
	return w.Flush()
}

// snapshotNginx makes snapshots of an nginx that answers.
func snapshotNginx(ctx context.Context, l *lab.Lab, names []string) error {
	port, err := lab.FreePorts(1)
	if err != nil {
		return err
	}
	if _, err := l.FCVM(ctx, "run", "-d", "--name", "golden", "-p", fmt.Sprintf("127.0.0.1:%d:80", port), l.Image); err != nil {
		return err
	}
	if err := lab.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/", port)); err != nil {
		return err
	}
	for _, name := range names {
		if _, err := l.FCVM(ctx, "snapshot", "create", "golden", "--name", name); err != nil {
			return err
		}
	}
	_, err = l.FCVM(ctx, "rm", "-f", "golden")
	return err
}

// nginxFaults starts a clone of the snapshot with the policy's name, asks it once, and
// returns how many faults it had. Its page server has ended when it returns.
func nginxFaults(ctx context.Context, l *lab.Lab, policy string) (uint64, error) {
	port, err := lab.FreePorts(1)
	if err != nil {
		return 0, err
	}
	if _, err := l.FCVM(ctx, "clone", "--snapshot", policy, "--policy", policy, "--name", "c", "-p", fmt.Sprintf("127.0.0.1:%d:80", port)); err != nil {
		return 0, err
	}
	if err := lab.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/", port)); err != nil {
		return 0, err
	}
	s, err := nginxStats(ctx, l)
	if err != nil {
		return 0, err
	}
	if len(s.VMs) != 1 {
		return 0, fmt.Errorf("%d VMs run, want one", len(s.VMs))
	}
	if _, err := l.FCVM(ctx, "rm", "-f", "c"); err != nil {
		return 0, err
	}
	for after := s; len(after.PageServers) > 0; {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if after, err = nginxStats(ctx, l); err != nil {
			return 0, err
		}
	}
	return s.VMs[0].Faults, nil
}

func nginxStats(ctx context.Context, l *lab.Lab) (s api.Stats, err error) {
	out, err := l.FCVM(ctx, "stats", "--no-stream", "--json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}
