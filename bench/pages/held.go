//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"text/tabwriter"

	"fcvm/internal/memstat"
	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/pstest"
)

const mib = 1 << 20

// benchSessions measures what a page server itself needs for many clones.
func benchSessions(ctx context.Context, b *bench) error {
	const pages, touched = 512 * mib / pageSize, 1024
	sessions := 100
	// Mostly holes, as memory files are: what is touched is spread over it.
	m, err := newMemory(b.dir, "large.mem", touched*8, nil)
	if err != nil {
		return err
	}
	defer m.close()
	m.pages = pages
	if err := os.Truncate(m.path, m.size()); err != nil {
		return err
	}
	o := random(m, touched*8).first(touched)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "policy\tsessions\tguest MiB\tfaults\tpage server, peak MiB")
	for _, policy := range []pageserver.Policy{pageserver.PolicyShare, pageserver.PolicyCopy} {
		peak, faults, err := b.sessionsOf(ctx, policy, o, sessions)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%.1f\n", policy, sessions, m.size()/mib, faults, float64(peak)/mib)
		b.Note("sessions", fmt.Sprintf("%s, %d sessions, peak", policy, sessions), float64(peak)/mib, "MiB")
		b.atMost(48, float64(peak)/mib, fmt.Sprintf("MiB of a page server with %d sessions, %s", sessions, policy))
	}
	return w.Flush()
}

func (b *bench) sessionsOf(ctx context.Context, policy pageserver.Policy, o *order, n int) (peak int64, faults uint64, err error) {
	err = b.serve(ctx, policy, o.memory, n, func(h *handler, c clones) error {
		if _, err := c.run(ctx, o, false); err != nil {
			return err
		}
		if faults, err = h.faults(ctx); err != nil {
			return err
		}
		peak, err = peakBytes(h.PID())
		return err
	})
	return peak, faults, err
}

// benchPSS compares what clones with policy share hold with the least that they can
// hold: the template once, and what each wrote.
func benchPSS(ctx context.Context, b *bench) error {
	const count, pages = 8, 64 * mib / pageSize
	m, err := newMemory(b.dir, "pss.mem", pages, nil)
	if err != nil {
		return err
	}
	defer m.close()
	var pss, private, template int64
	err = b.serve(ctx, pageserver.PolicyShare, m, count, func(h *handler, c clones) error {
		// Every page is read, and each clone writes to another eighth.
		if _, err := c.run(ctx, random(m, pages), false); err != nil {
			return err
		}
		_, err = c.each(ctx, func(i int) pstest.Script {
			own := pstest.Range(i*pages/count, pages/count)
			return pstest.Script{Threads: [][]pstest.Op{{{Kind: pstest.Write, Pages: own}}}}
		})
		if err != nil {
			return err
		}
		if pss, private, err = c.pss(); err != nil {
			return err
		}
		template, err = memstat.Resident(h.template())
		return err
	})
	if err != nil {
		return err
	}
	least := template + private
	over := 100 * (float64(pss)/float64(least) - 1)
	fmt.Printf("%d clones of %d MiB that read all, and write an eighth each: PSS %.1f MiB; template %.1f + private %.1f = %.1f MiB: %+.2f %%\n",
		count, m.size()/mib, float64(pss)/mib, float64(template)/mib, float64(private)/mib, float64(least)/mib, over)
	b.Note("pss", "PSS of 8 clones", float64(pss)/mib, "MiB")
	b.Note("pss", "template and private pages", float64(least)/mib, "MiB")
	b.atMost(5, max(over, -over), "% that PSS of 8 clones is off template + private")
	return nil
}
