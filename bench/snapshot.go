package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"fcvm/internal/api"
)

// benchSnapshot measures for how long a VM stands still while it is snapshotted:
// a golden VM, whose every page must be written, and clones of it that changed
// 4 MiB, of a small and of a large guest.
func benchSnapshot(ctx context.Context, b *bench) error {
	fmt.Printf("\nsnapshot: the VM's pause\n")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "VM\tguest MiB\tprivate MiB\tpause ms\ttotal ms\t")
	for _, guest := range []int{256, 1024, 2048} {
		if err := b.pauses(ctx, w, guest); err != nil {
			// What was measured is shown all the same.
			return errors.Join(fmt.Errorf("guest of %d MiB: %w", guest, err), w.Flush())
		}
	}
	return w.Flush()
}

func (b *bench) pauses(ctx context.Context, w *tabwriter.Writer, guest int) error {
	// Random bytes in the page cache and in a tmpfs: pages that are not zero.
	fill := func(vm string, mib int) error {
		_, err := b.FCVM(ctx, "exec", vm, "dd", "if=/dev/urandom", "of=/dev/shm/fill", "bs=1M", fmt.Sprintf("count=%d", mib))
		return err
	}
	golden := fmt.Sprintf("golden%d", guest)
	if _, err := b.FCVM(ctx, "run", "-d", "--name", golden, "-m", fmt.Sprintf("%dm", guest), b.Image); err != nil {
		return err
	}
	// What kernel and container take already is some 50 MiB.
	if err := fill(golden, 50); err != nil {
		return err
	}
	if err := b.pause(ctx, w, "golden", golden, guest); err != nil {
		return err
	}
	clone := fmt.Sprintf("clone%d", guest)
	if _, err := b.FCVM(ctx, "clone", "--name", clone, "--snapshot", golden+"-1"); err != nil {
		return err
	}
	if err := fill(clone, 3); err != nil {
		return err
	}
	if err := b.pause(ctx, w, "clone, some MiB of its own", clone, guest); err != nil {
		return err
	}
	return b.Clear(ctx)
}

// pause snapshots a VM five times and prints the median pause.
func (b *bench) pause(ctx context.Context, w *tabwriter.Writer, what, vm string, guest int) error {
	var all []api.SnapshotResult
	for i := range 5 {
		// What earlier snapshots left to be written to disk is no part of this one's pause:
		// the kernel makes whoever writes wait when there is much of it.
		unix.Sync()
		out, err := b.FCVM(ctx, "snapshot", "create", vm, "--name", fmt.Sprintf("%s-%d", vm, i+1), "--json")
		if err != nil {
			return err
		}
		var r api.SnapshotResult
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return err
		}
		all = append(all, r)
	}
	mid := median(all)
	fmt.Fprintf(w, "%s\t%d\t%.1f\t%.1f\t%.1f\t\n", what, guest, float64(mid.PrivateBytes)/(1<<20), mid.PauseMillis, mid.TotalMillis)
	b.Note("snapshot", fmt.Sprintf("%s %d pause", what, guest), mid.PauseMillis, "ms")
	return nil
}

// median by pause.
func median(all []api.SnapshotResult) api.SnapshotResult {
	s := slices.SortedFunc(slices.Values(all), func(a, b api.SnapshotResult) int {
		return cmp.Compare(a.PauseMillis, b.PauseMillis)
	})
	return s[len(s)/2]
}
