//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"fcvm/bench/internal/report"
	"fcvm/internal/pageserver"
)

// benchKill kills page servers under load, and measures the longest access of any
// clone: how long its guest stood still.
func benchKill(ctx context.Context, b *bench) error {
	const clones, pages = 8, 64 * mib / pageSize
	kills := 10
	if b.quick {
		kills = 2
	}
	m, err := newMemory(b.dir, "kill.mem", pages, nil)
	if err != nil {
		return err
	}
	defer m.close()
	fmt.Printf("%d clones that fault all the time; a kill a round, at another moment each\n", clones)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "policy\tkills\tlongest access, median ms\tmax ms\thandover itself, median ms")
	for _, policy := range []pageserver.Policy{pageserver.PolicyCopy, pageserver.PolicyShare} {
		var longest, handovers []float64
		for i := range kills {
			// Share is done sooner, as faults on one window are one.
			after := time.Duration(5+10*i) * time.Millisecond
			if policy == pageserver.PolicyShare {
				after /= 4
			}
			pause, handover, err := b.killed(ctx, policy, random(m, pages), clones, after)
			if err != nil {
				return fmt.Errorf("%s: %w", policy, err)
			}
			longest, handovers = append(longest, report.Millis(pause)), append(handovers, report.Millis(handover))
		}
		fmt.Fprintf(w, "%s\t%d\t%.1f\t%.1f\t%.1f\n", policy, kills, report.Percentile(longest, 50), slices.Max(longest), report.Percentile(handovers, 50))
		b.Note("kill", string(policy)+"; longest access, median", report.Percentile(longest, 50), "ms")
		b.Note("kill", string(policy)+"; longest access", slices.Max(longest), "ms")
		b.atMost(1000, slices.Max(longest), "ms that a clone stood still when its page server was killed, "+string(policy))
	}
	return w.Flush()
}

func (b *bench) killed(ctx context.Context, policy pageserver.Policy, o *order, n int, after time.Duration) (pause, handover time.Duration, err error) {
	if err := o.memory.warm(); err != nil {
		return 0, 0, err
	}
	err = b.serve(ctx, policy, o.memory, n, func(h *handler, c clones) error {
		before, err := h.faults(ctx)
		if err != nil {
			return err
		}
		pid := h.PID()
		killed := make(chan error, 1)
		go func() {
			// The clones begin when they have all been told to.
			for ctx.Err() == nil {
				if n, err := h.faults(ctx); err != nil || n > before {
					break
				}
				time.Sleep(time.Millisecond)
			}
			time.Sleep(after)
			killed <- syscall.Kill(pid, syscall.SIGKILL)
		}()
		outcomes, err := c.run(ctx, o, true)
		if err = errors.Join(err, <-killed); err != nil {
			return err
		}
		for _, one := range outcomes {
			pause = max(pause, time.Duration(slices.Max(one.Latencies)))
		}
		if h.PID() == pid {
			return errors.New("the clones were done before the page server was killed")
		}
		handover = h.Handovers().Longest
		return nil
	})
	return pause, handover, err
}
