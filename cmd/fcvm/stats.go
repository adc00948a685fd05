//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/ui"
)

const statsLong = `Show what the guest memory of running VMs really holds, as the kernel tells it in
/proc/PID/smaps:

    RESIDENT  what is in memory at all
    PRIVATE   what only this VM has mapped
    SHARED    what another process has mapped, too
    PSS       resident, where a shared page counts as its share
    OVERHEAD  PSS of the VM's process apart from guest memory
    FAULTS    page faults that the guest waited for, and the page server answered

and for each page server what its template holds, how much of that was there before
a clone asked for it (AHEAD: from the working set, and filled in the background),
what it needs itself (OWN), and how long its answers took (P50, P99; from reading a
fault on). --json has all that is counted, and ` + "`fcvm inspect`" + ` what of it is one VM's.

The total compares what the same VMs would hold if nothing were shared with what
they hold, templates of page servers counted once. Spares (` + "`fcvm serve --help`" + `) are part of
what is held.

On a terminal the table is drawn anew every second, until Ctrl-C.`

func newStats(a *app) *cobra.Command {
	var once, asJSON bool
	cmd := &cobra.Command{
		Use:   "stats [flags]",
		Short: "Show what VMs hold in memory, and what they share",
		Long:  statsLong,
		Args:  exactly(0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.stats(cmd.Context(), once, asJSON) },
	}
	f := cmd.Flags()
	f.BoolVar(&once, "no-stream", false, "print the table once")
	f.BoolVar(&asJSON, "json", false, "print JSON, once")
	return cmd
}

func (a *app) stats(ctx context.Context, once, asJSON bool) error {
	return a.withClient(ctx, func(c *api.Client) error {
		if !once && !asJSON && ui.IsTerminal(a.ui.Out) {
			return a.ui.Live(ctx, time.Second, func(ctx context.Context) (string, error) {
				st, err := c.Stats(ctx)
				if err != nil {
					return "", err
				}
				return statsText(st)
			})
		}
		st, err := c.Stats(ctx)
		if err != nil {
			return err
		}
		if asJSON {
			st.Version = api.SchemaVersion
			if st.VMs == nil {
				st.VMs = []api.VMStats{}
			}
			if st.PageServers == nil {
				st.PageServers = []api.PageServerStats{}
			}
			return a.ui.JSON(st)
		}
		text, err := statsText(st)
		if err != nil {
			return err
		}
		_, err = a.ui.Out.Write([]byte(text))
		return err
	})
}

func statsText(st api.Stats) (string, error) {
	var b bytes.Buffer
	rows := make([][]string, 0, len(st.VMs))
	for _, vm := range st.VMs {
		rows = append(rows, []string{
			vm.Name, ui.Size(vm.RSSBytes), ui.Size(vm.PrivateBytes), ui.Size(vm.SharedBytes), ui.Size(vm.PSSBytes),
			ui.Size(vm.OverheadBytes), strconv.FormatUint(vm.Faults, 10), ui.Size(vm.MemoryBytes), vm.Snapshot,
		})
	}
	err := ui.WriteTable(&b, []string{"NAME", "RESIDENT", "PRIVATE", "SHARED", "PSS", "OVERHEAD", "FAULTS", "GUEST", "SNAPSHOT"}, rows)
	if err != nil || len(st.VMs) == 0 {
		return b.String(), err
	}
	if len(st.PageServers) > 0 {
		b.WriteByte('\n')
		if err := pageServersText(&b, st.PageServers); err != nil {
			return "", err
		}
	}
	t := st.Total
	fmt.Fprintf(&b, "\n%s: %s if nothing were shared, %s held, %.1f%% saved",
		plural(len(st.VMs), "VM"), ui.Size(t.UnsharedBytes), ui.Size(t.HeldBytes), t.SavedPercent)
	if t.MemoryBytes > 0 {
		fmt.Fprintf(&b, " (%.1f%% of the guests' %s)", 100*(1-float64(t.HeldBytes)/float64(t.MemoryBytes)), ui.Size(t.MemoryBytes))
	}
	fmt.Fprintf(&b, "\noverhead of all VMs' processes and page servers: %s\n", ui.Size(t.OverheadBytes))
	if t.Spares > 0 {
		fmt.Fprintf(&b, "of all that, %s for the next clones: %s\n", plural(t.Spares, "spare"), ui.Size(t.SpareBytes))
	}
	seen := map[string]bool{}
	for _, vm := range st.VMs {
		if vm.Hint != "" && !seen[vm.Hint] {
			seen[vm.Hint] = true
			fmt.Fprintf(&b, "hint: %s\n", ui.Clean(vm.Hint))
		}
	}
	return b.String(), nil
}

func pageServersText(b *bytes.Buffer, all []api.PageServerStats) error {
	rows := make([][]string, 0, len(all))
	var handovers int
	var longest float64
	for _, p := range all {
		policy := p.Policy
		if p.NoReplay {
			policy += ", no replay"
		}
		rows = append(rows, []string{
			p.Snapshot, policy, strconv.Itoa(p.Sessions), ui.Size(p.TemplateBytes), ui.Size(p.ReplayedBytes + p.BackgroundBytes), ui.Size(p.RSSBytes),
			strconv.FormatUint(p.Faults, 10), micros(p.Demand.P50Micros), micros(p.Demand.P99Micros),
		})
		handovers += p.Handovers.Count
		longest = max(longest, p.Handovers.LongestMillis)
	}
	header := []string{"PAGE SERVER", "POLICY", "CLONES", "TEMPLATE", "AHEAD", "OWN", "FAULTS", "P50", "P99"}
	if err := ui.WriteTable(b, header, rows); err != nil {
		return err
	}
	if handovers > 0 {
		fmt.Fprintf(b, "page servers were replaced %s, within %s\n", plural(handovers, "time"), ui.Millis(longest))
	}
	return nil
}

// micros prints the bound of a histogram's bucket.
func micros(us float64) string {
	switch {
	case us == 0:
		return "-"
	case us >= 1000:
		return fmt.Sprintf("<%.3gms", us/1000)
	}
	return fmt.Sprintf("<%.3gµs", us)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
