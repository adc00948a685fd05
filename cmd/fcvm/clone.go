//go:build linux

package main

import (
	"cmp"
	"context"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/ui"
	"fcvm/internal/vmm"
)

const cloneLong = `Start clones of a snapshot. They go on where the snapshot was taken, each with
a host name, a machine ID, random numbers and a clock of its own, and share the
memory that they don't change.

The names are printed when every clone is ready. When one can't be started, none
is left. With -n 10, --name web makes web-1 to web-10, and -p 8080:80 gives them
the ports 8080 to 8089.`

type cloneOptions struct {
	snapshot, name, backend, policy string
	count                           int
	ports, env                      []string
	merge, noReplay, jail, json     bool
}

func newClone(a *app) *cobra.Command {
	var o cloneOptions
	cmd := &cobra.Command{
		Use:   "clone --snapshot NAME [flags]",
		Short: "Start clones of a snapshot",
		Long:  cloneLong,
		Args:  exactly(0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.clone(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.snapshot, "snapshot", "", "`NAME` of the snapshot")
	f.StringVar(&o.name, "name", "", "name of the clone, or with -n the beginning of the names (default: generated)")
	f.IntVarP(&o.count, "count", "n", 1, "`number` of clones")
	f.StringArrayVarP(&o.ports, "publish", "p", nil, "publish a port: `[[IP:][HOST]:]GUEST[/udp]`; each further clone listens one port higher")
	f.StringArrayVarP(&o.env, "env", "e", nil, "set `NAME=value` for commands that exec starts in the clones")
	f.StringVar(&o.backend, "mem-backend", string(vmm.BackendUFFD), "where memory comes from: uffd (the page server) or file (the kernel maps the memory file)")
	f.StringVar(&o.policy, "policy", "", "of the page server: share (clones map one template) or copy (private pages) (default: share, and copy where memory is of huge pages)")
	f.BoolVar(&o.merge, "merge", false, "with --policy copy: have the kernel keep pages once that clones hold alike (KSM). A guest can find out by the time of its writes which pages others hold")
	f.BoolVar(&o.noReplay, "no-replay", false, "get no page before it is asked for, and record none for later clones (fcvm snapshot inspect tells what was recorded)")
	f.BoolVar(&o.jail, "jail", false, "lock Firecracker up: a user, a root and namespaces of its own, and limits (needs root)")
	f.BoolVar(&o.json, "json", false, "print the clones as JSON")
	_ = cmd.RegisterFlagCompletionFunc("snapshot", a.completeSnapshots)
	return cmd
}

const (
	policyShare = "share"
	policyCopy  = "copy"
	// maxClones bounds one request; more than this on one machine is a typing error.
	maxClones = 10000
)

func (o *cloneOptions) request(lookup func(string) (string, bool)) (api.CloneRequest, error) {
	req := api.CloneRequest{Snapshot: o.snapshot, Name: o.name, Count: o.count, MemBackend: o.backend, Policy: o.policy, Merge: o.merge, NoReplay: o.noReplay, Jail: o.jail}
	if o.snapshot == "" {
		return req, &usageError{message: "missing --snapshot", hint: "`fcvm snapshot ls` shows the snapshots"}
	}
	if o.count < 1 || o.count > maxClones {
		return req, invalid("bad number of clones %d: want 1 to %d", o.count, maxClones)
	}
	switch vmm.Backend(o.backend) {
	case vmm.BackendUFFD, vmm.BackendFile:
	default:
		return req, invalid("bad --mem-backend %q: want uffd or file", o.backend)
	}
	switch o.policy {
	case "", policyShare, policyCopy:
	default:
		return req, invalid("bad --policy %q: want share or copy", o.policy)
	}
	if o.merge && (o.policy != policyCopy || o.backend != string(vmm.BackendUFFD)) {
		return req, invalid("--merge is for --policy copy only: with the others, clones share pages from the start")
	}
	err := checkVMName(o.name)
	if err != nil {
		return req, err
	}
	if req.Ports, err = parsePorts(o.ports); err != nil {
		return req, err
	}
	req.Env, err = parseEnv(nil, o.env, lookup)
	return req, err
}

func (a *app) clone(ctx context.Context, o cloneOptions) error {
	req, err := o.request(os.LookupEnv)
	if err != nil {
		return err
	}
	return a.withClient(ctx, func(c *api.Client) error {
		begin := time.Now()
		p := a.ui.Progress()
		defer p.Done()
		ready := 0
		vms, err := c.Clone(ctx, req, func(api.VM) {
			ready++
			if req.Count > 1 {
				p.SetCount("clones ready:", ready, req.Count)
			}
		})
		p.Done()
		if ctx.Err() != nil && err != nil {
			a.settle(ctx, c, func(vm api.VM) bool {
				if vm.Created.Before(begin) || vm.Snapshot != req.Snapshot {
					return false
				}
				if req.Name == "" { // it may be somebody else's; one that runs is
					return vm.State != api.StateRunning
				}
				return vm.Name == req.Name || strings.HasPrefix(vm.Name, req.Name+"-")
			})
		}
		if err != nil {
			return err
		}
		took := float64(time.Since(begin)) / float64(time.Millisecond)
		a.warn(vms...)
		sortClones(vms)
		if o.json {
			return a.ui.JSON(vmList{Version: api.SchemaVersion, VMs: vms})
		}
		for _, vm := range vms {
			if err := a.ui.Println(vm.Name); err != nil {
				return err
			}
		}
		if len(vms) == 1 {
			a.ui.Note("ready in %s", ui.Millis(took))
		} else {
			a.ui.Note("%d clones ready in %s, %s each", len(vms), ui.Millis(took), ui.Millis(took/float64(len(vms))))
		}
		return nil
	})
}

// sortClones puts web-2 before web-10. Clones become ready in any order.
func sortClones(vms []api.VM) {
	slices.SortStableFunc(vms, func(a, b api.VM) int {
		return cmp.Or(cmp.Compare(len(a.Name), len(b.Name)), cmp.Compare(a.Name, b.Name))
	})
}
