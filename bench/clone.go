package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	"fcvm/bench/internal/lab"
	"fcvm/bench/internal/report"
)

// benchClone measures cold run to ready, then clones one after another, beside
// the floor: the same QEMU started by hand with the same state, nothing of fcvm.
func benchClone(ctx context.Context, b *bench) error {
	runs, clones := 5, 100
	if b.quick {
		runs, clones = 2, 10
	}
	var cold []time.Duration
	for i := range runs {
		d, err := b.Timed(ctx, "run", "-d", "--name", "cold"+strconv.Itoa(i), b.Image)
		if err != nil {
			return err
		}
		cold = append(cold, d)
		if i == runs-1 {
			break
		}
		if _, err := b.FCVM(ctx, "rm", "-f", "cold"+strconv.Itoa(i)); err != nil {
			return err
		}
	}
	golden := "cold" + strconv.Itoa(runs-1)
	time.Sleep(2 * time.Second) // nginx is up
	if _, err := b.FCVM(ctx, "snapshot", "create", golden, "--name", "nginx"); err != nil {
		return err
	}
	if _, err := b.FCVM(ctx, "rm", "-f", golden); err != nil {
		return err
	}

	q, err := b.floor(ctx, "nginx")
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	defer q.end()
	floor, err := q.times(ctx, 20)
	if err != nil {
		return err
	}
	q.end()
	// The floor is measured between the clones, too, on the same terms: its QEMUs
	// live on as the clones do, so that both need memory that nothing used before,
	// which is dear where this machine is itself a VM. Ten clones in a row meet the
	// supervisor as it is then, still busy with a VMM for the next; the first of ten,
	// after a pause, does not.
	var between, rested, row []time.Duration
	for i := range clones {
		if i%10 == 0 {
			ds, err := q.times(ctx, 5)
			if err != nil {
				return err
			}
			between = append(between, ds...)
			time.Sleep(time.Second)
		}
		d, err := b.Timed(ctx, "clone", "--snapshot", "nginx", "--name", "c"+strconv.Itoa(i))
		if err != nil {
			return err
		}
		if row = append(row, d); i%10 == 0 && i > 0 {
			rested = append(rested, d)
		}
	}
	if err := b.Clear(ctx); err != nil {
		return err
	}

	fmt.Printf("\nclone to ready (%d, ten in a row without a pause, all alive at the end; the CLI's start and end included)\n", clones)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	base, first := report.Percentile(between, 50), report.Percentile(between[:5], 50)
	fmt.Fprintln(w, "\tp50 ms\tp99 ms\tx floor\t")
	for _, r := range []struct {
		name string
		ds   []time.Duration
		base time.Duration
	}{
		{"floor: bare QEMU start + load, 20 in a row, no clones", floor, base},
		{"floor, before the first clone", between[:5], first},
		{"the first clone", row[:1], first},
		{"clone 1-10", row[:10], first},
		{"floor, between the clones", between, base},
		{fmt.Sprintf("clone 1-%d", clones), row, base},
		{"clone after a pause", rested, base},
		{"cold run", cold, base},
	} {
		if len(r.ds) == 0 {
			continue
		}
		p50, p99 := report.Percentile(r.ds, 50), report.Percentile(r.ds, 99)
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.2f\t\n", r.name, report.Millis(p50), report.Millis(p99), report.Millis(p50)/report.Millis(r.base))
		b.Note("clone", r.name+" p50", report.Millis(p50), "ms")
		b.Note("clone", r.name+" p99", report.Millis(p99), "ms")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("clone p50 / cold run p50: %.3f\n", report.Millis(report.Percentile(row, 50))/report.Millis(report.Percentile(cold, 50)))
	return nil
}

// benchMany measures `clone -n N`, and what N clones hold that each served requests.
func benchMany(ctx context.Context, b *bench) error {
	counts := []int{1, 10, 100}
	if b.quick {
		counts = []int{1, 10}
	}
	if _, err := b.FCVM(ctx, "snapshot", "inspect", "nginx"); err != nil {
		return fmt.Errorf("the section clone makes the snapshot: %w", err)
	}
	fmt.Printf("\nclone -n N, every clone then answers 3 requests; memory in MiB\n")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "N\tpolicy\twall s\tms a clone\tunshared\theld\tsaved %\tprivate max %\tprivate a clone\tQEMU a clone\tpage server\tfaults a clone\t")
	for _, n := range counts {
		for _, policy := range []string{"share", "copy", "file"} {
			if err := b.many(ctx, w, n, policy); err != nil {
				// What was measured is shown all the same.
				return errors.Join(fmt.Errorf("%d clones, %s: %w", n, policy, err), w.Flush())
			}
		}
	}
	return w.Flush()
}

func (b *bench) many(ctx context.Context, w io.Writer, n int, policy string) error {
	port, err := lab.FreePorts(n)
	if err != nil {
		return err
	}
	args := []string{"clone", "--snapshot", "nginx", "--name", "m", "-n", strconv.Itoa(n), "-p", fmt.Sprintf("127.0.0.1:%d:80", port)}
	if policy == "file" {
		args = append(args, "--mem-backend", "file")
	} else {
		args = append(args, "--policy", policy)
	}
	wall, err := b.Timed(ctx, args...)
	if err != nil {
		return err
	}
	for range 3 {
		for i := range n {
			if err := lab.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/", port+i)); err != nil {
				return err
			}
		}
	}
	s, err := b.stats(ctx)
	if err != nil {
		return err
	}
	var private, overhead, server int64
	var faults uint64
	var worst float64
	for _, vm := range s.VMs {
		private += vm.PrivateBytes
		overhead += vm.OverheadBytes
		faults += vm.Faults
		if vm.RSSBytes > 0 {
			worst = max(worst, 100*float64(vm.PrivateBytes)/float64(vm.RSSBytes))
		}
	}
	for _, p := range s.PageServers {
		server += p.RSSBytes
	}
	mib := func(x int64) float64 { return float64(x) / (1 << 20) }
	k := float64(n)
	fmt.Fprintf(w, "%d\t%s\t%.2f\t%.0f\t%.1f\t%.1f\t%.1f\t%.1f\t%.2f\t%.1f\t%.1f\t%.0f\t\n", n, policy, wall.Seconds(), report.Millis(wall)/k,
		mib(s.Total.UnsharedBytes), mib(s.Total.HeldBytes), s.Total.SavedPercent, worst, mib(private)/k, mib(overhead)/k, mib(server), float64(faults)/k)
	for name, v := range map[string]float64{"wall s": wall.Seconds(), "saved percent": s.Total.SavedPercent, "private MiB a clone": mib(private) / k} {
		b.Note("many", fmt.Sprintf("%d %s %s", n, policy, name), v, "")
	}
	return b.Clear(ctx)
}
