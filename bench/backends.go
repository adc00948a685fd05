package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	"fcvm/bench/internal/report"
	"fcvm/internal/api"
)

// backend is one way in which clones get their memory.
type backend struct {
	name string
	args []string
	// mayLack is of one that not every kernel and engine has.
	mayLack bool
}

// origin is a VM that is cloned in several ways.
type origin struct {
	name, engine string
	args         []string
	backends     []backend
}

func origins() []origin {
	all := []backend{
		{name: "share"},
		{name: "copy", args: []string{"--policy", "copy"}},
		{name: "copy --merge", args: []string{"--policy", "copy", "--merge"}, mayLack: true},
		{name: "file", args: []string{"--mem-backend", "file"}},
	}
	return []origin{
		{"qemu", "qemu", nil, all},
		{"firecracker", "firecracker", nil, all},
		{"hugepages", "firecracker", []string{"--hugepages"}, []backend{{name: "copy, huge pages"}}},
	}
}

// benchBackends compares what ten clones hold in each way, on each engine that runs
// here. Each clone reads all of nginx's program, by exec: not every engine has a network.
func benchBackends(ctx context.Context, b *bench) error {
	n := 10
	if b.quick {
		n = 3
	}
	fmt.Printf("\n%d clones that each did some work; memory in MiB a clone, time in ms\n", n)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "engine\tbackend\tprivate\tshared\tPSS\tVMM's own\tdemand faults\tclone to ready p50\tp99\t")
	for _, o := range origins() {
		golden := "golden-" + o.name
		if _, err := b.FCVM(ctx, append(append([]string{"run", "-d", "--name", golden, "--engine", o.engine}, o.args...), b.Image)...); err != nil {
			if ctx.Err() != nil {
				return err
			}
			fmt.Printf("%s is left out: %v\n", o.name, err)
			continue
		}
		if err := b.work(ctx, golden); err != nil {
			return err
		}
		if _, err := b.FCVM(ctx, "snapshot", "create", golden, "--name", o.name); err != nil {
			return err
		}
		if err := b.Clear(ctx); err != nil {
			return err
		}
		for _, how := range o.backends {
			err := b.backend(ctx, w, o, how, n)
			if err != nil && how.mayLack && ctx.Err() == nil {
				fmt.Printf("%s, %s is left out: %v\n", o.engine, how.name, err)
				err = b.Clear(ctx)
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w", o.engine, how.name, err)
			}
		}
	}
	return w.Flush()
}

// work has a guest read some MiB.
func (b *bench) work(ctx context.Context, vm string) error {
	_, err := b.FCVM(ctx, "exec", vm, "sha256sum", "/usr/sbin/nginx")
	return err
}

// sum is what all VMs hold.
func (b *bench) sum(ctx context.Context) (sum api.VMStats, err error) {
	s, err := b.stats(ctx)
	if err != nil {
		return sum, err
	}
	for _, vm := range s.VMs {
		sum.PrivateBytes += vm.PrivateBytes
		sum.SharedBytes += vm.SharedBytes
		sum.PSSBytes += vm.PSSBytes
		sum.OverheadBytes += vm.OverheadBytes
		sum.Faults += vm.Faults
	}
	return sum, nil
}

func (b *bench) backend(ctx context.Context, w *tabwriter.Writer, o origin, how backend, n int) error {
	// The first one is for the working set, which later ones get.
	var ready []float64
	for i := range n + 1 {
		name := "c" + strconv.Itoa(i)
		d, err := b.Timed(ctx, append([]string{"clone", "--snapshot", o.name, "--name", name}, how.args...)...)
		if err != nil {
			return err
		}
		if err := b.work(ctx, name); err != nil {
			return err
		}
		if i > 0 {
			ready = append(ready, report.Millis(d))
		}
	}
	if _, err := b.FCVM(ctx, "rm", "-f", "c0"); err != nil {
		return err
	}
	sum, err := b.sum(ctx)
	if err != nil {
		return err
	}
	if how.mayLack {
		// KSM reads all memory, again and again, until nothing more is found.
		for rounds := 0; rounds < 5; {
			before := sum.PSSBytes
			time.Sleep(5 * time.Second)
			if sum, err = b.sum(ctx); err != nil {
				return err
			}
			if rounds++; sum.PSSBytes < before-before/50 {
				rounds = 0
			}
		}
	}
	mib := func(x int64) float64 { return float64(x) / (1 << 20) / float64(n) }
	p50, p99 := report.Percentile(ready, 50), report.Percentile(ready, 99)
	fmt.Fprintf(w, "%s\t%s\t%.2f\t%.2f\t%.2f\t%.1f\t%.0f\t%.0f\t%.0f\t\n", o.engine, how.name, mib(sum.PrivateBytes), mib(sum.SharedBytes), mib(sum.PSSBytes),
		mib(sum.OverheadBytes), float64(sum.Faults)/float64(n), p50, p99)
	b.Note("backends", o.engine+" "+how.name+" private MiB", mib(sum.PrivateBytes), "MiB")
	b.Note("backends", o.engine+" "+how.name+" p50", p50, "ms")
	return b.Clear(ctx)
}
