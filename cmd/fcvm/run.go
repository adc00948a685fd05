//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/datadir"
	"fcvm/internal/guest"
	"fcvm/internal/image"
	"fcvm/internal/ui"
	"fcvm/internal/vmm"
)

const runLong = `Run a container image in a microVM.

Flags may stand on either side of the image. From the command's first word on,
everything belongs to the command:

    fcvm run nginx:latest --name golden
    fcvm run -d -p 8080:80 nginx
    fcvm run --rm alpine ls -la /

The image is a registry reference, or oci:DIR[:TAG], oci-archive:FILE,
docker-archive:FILE.

In the foreground the output of the container's process is shown, signals are
forwarded to it, and its exit code is returned. The third Ctrl-C ends the VM.
With -d the name of the VM is printed once the process was started.`

const envEngine = "FCVM_ENGINE"

type runOptions struct {
	name, memory, cpus, entrypoint, workdir, user, hostname string
	engine, network, pull, kernel, bootTimeout              string
	env, envFiles, ports                                    []string
	detach, remove, interactive, tty, jail, hugePages       bool
	entrypointSet                                           bool
}

func newRun(a *app) *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:               "run [flags] IMAGE [flags] [COMMAND [ARG...]]",
		Short:             "Run an image in a microVM",
		Long:              runLong,
		ValidArgsFunction: a.completeImages,
	}
	f := cmd.Flags()
	f.BoolVarP(&o.detach, "detach", "d", false, "return when the process was started, and print the VM's name")
	f.StringVar(&o.name, "name", "", "name of the VM (default: a generated one)")
	f.BoolVar(&o.remove, "rm", false, "remove the VM when it has exited")
	f.StringArrayVarP(&o.env, "env", "e", nil, "set `NAME=value`, or take NAME from this environment")
	f.StringArrayVar(&o.envFiles, "env-file", nil, "read environment variables from `FILE`, one a line")
	f.StringArrayVarP(&o.ports, "publish", "p", nil, "publish a port: `[[IP:][HOST]:]GUEST[/udp]`, or ranges")
	f.StringVar(&o.cpus, "cpus", "1", "virtual CPUs, a whole `number`")
	f.StringVarP(&o.memory, "memory", "m", "512m", "guest memory, a `size` such as 512m or 2g; 128m or more")
	f.BoolVar(&o.hugePages, "hugepages", false, "guest memory of huge pages of 2 MiB, which are fast, and copied for each clone (takes the engine firecracker)")
	f.StringVar(&o.entrypoint, "entrypoint", "", "replace the image's entrypoint; \"\" removes it")
	f.StringVarP(&o.workdir, "workdir", "w", "", "working directory in the VM")
	f.StringVarP(&o.user, "user", "u", "", "`USER[:GROUP]` by name or number")
	f.StringVar(&o.hostname, "hostname", "", "host name in the VM (default: the VM's name)")
	f.BoolVarP(&o.interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the process a terminal")
	f.StringVar(&o.engine, "engine", "", "`engine` that runs the VM: qemu or firecracker (default: $"+envEngine+", or the one that fcvm doctor names)")
	f.StringVar(&o.network, "network", "", "`network` of the VM and its clones: user (QEMU's own), tap (a TAP of the VM's own), tap-host (the same, and the host's loopback is 10.0.2.2) or none (default: the engine's)")
	f.BoolVar(&o.jail, "jail", false, "lock Firecracker up: a user, a root and namespaces of its own, and limits (needs root; takes the engine firecracker)")
	f.StringVar(&o.pull, "pull", string(image.PullMissing), "when to ask the registry: missing, always or never")
	f.StringVar(&o.kernel, "kernel", "", "boot this kernel `FILE` instead of the one that `fcvm setup` installed")
	f.StringVar(&o.bootTimeout, "boot-timeout", "", "give up when the guest has not booted after this `time`, in seconds or as 1m30s")
	bothSides(cmd)
	processFlags(cmd)
	cmd.RunE = asProcess(func(cmd *cobra.Command, args []string) error {
		ref, command, err := splitArgs(cmd, args, "image")
		if err != nil {
			return err
		}
		if helpAsked(cmd) {
			return cmd.Help()
		}
		o.entrypointSet = cmd.Flags().Changed("entrypoint")
		return a.run(cmd.Context(), o, ref, command)
	})
	return cmd
}

// request checks the options and turns them into the supervisor's words, all but
// the image's ID.
func (o *runOptions) request(ref string, command []string, lookup func(string) (string, bool)) (api.RunRequest, error) {
	req := api.RunRequest{
		Name: o.name, Image: ref, Command: command, WorkDir: o.workdir, User: o.user, Hostname: o.hostname,
		TTY: o.tty, OpenStdin: o.interactive, Engine: o.engine, Network: vmm.Network(o.network), Jail: o.jail, HugePages: o.hugePages,
		AutoRemove: o.remove,
	}
	if v, ok := lookup(envEngine); ok && req.Engine == "" {
		req.Engine = v
	}
	var err error
	if err := checkVMName(o.name); err != nil {
		return req, err
	}
	if req.MemoryBytes, err = parseMemory(o.memory); err != nil {
		return req, err
	}
	if req.CPUs, err = parseCPUs(o.cpus); err != nil {
		return req, err
	}
	if req.Ports, err = parsePorts(o.ports); err != nil {
		return req, err
	}
	if req.Env, err = parseEnv(o.envFiles, o.env, lookup); err != nil {
		return req, err
	}
	if o.workdir != "" && !strings.HasPrefix(o.workdir, "/") {
		return req, invalid("bad working directory %q: it must begin with /", o.workdir)
	}
	switch req.Network {
	case "", vmm.NetworkUser, vmm.NetworkTAP, vmm.NetworkTAPHost, vmm.NetworkNone:
	default:
		return req, invalid("bad --network %q: want user, tap, tap-host or none", o.network)
	}
	switch image.Policy(o.pull) {
	case image.PullMissing, image.PullAlways, image.PullNever:
	default:
		return req, invalid("bad --pull %q: want missing, always or never", o.pull)
	}
	if o.entrypointSet {
		if o.entrypoint == "" {
			req.ClearEntrypoint = true
		} else {
			req.Entrypoint = []string{o.entrypoint}
		}
	}
	if o.bootTimeout != "" {
		d, err := parseSeconds(o.bootTimeout)
		if err != nil {
			return req, err
		}
		req.BootTimeout = d.Seconds()
	}
	if o.kernel != "" {
		fi, err := os.Stat(o.kernel)
		if err != nil {
			return req, invalid("kernel: %v", err)
		}
		if !fi.Mode().IsRegular() {
			return req, invalid("kernel %s is not a file", o.kernel)
		}
		if req.Kernel, err = filepath.Abs(o.kernel); err != nil {
			return req, fmt.Errorf("find kernel %s: %w", o.kernel, err)
		}
	}
	return req, nil
}

func (a *app) run(ctx context.Context, o runOptions, ref string, command []string) error {
	req, err := o.request(ref, command, os.LookupEnv)
	if err != nil {
		return err
	}
	if o.interactive && o.tty && !o.detach && !ui.IsTerminal(a.in) {
		return invalid("-i and -t together need a terminal, and standard input is none")
	}
	l, err := a.layout()
	if err != nil {
		return err
	}
	// Before a large image is downloaded for nothing.
	if _, err := guest.Open(l.Guest()); err != nil {
		return err
	}
	img, err := a.pull(ctx, l, ref, image.Policy(o.pull))
	if err != nil {
		return err
	}
	if _, err := image.ResolveCommand(&img.Config, req.Entrypoint, req.ClearEntrypoint, command); err != nil {
		return err
	}
	req.ImageID = img.ID
	return a.withClient(ctx, func(c *api.Client) error {
		if o.detach {
			vm, err := a.start(ctx, c, req)
			if err != nil {
				return err
			}
			return a.ui.Println(vm.Name)
		}
		return a.runForeground(ctx, c, req)
	})
}

// pull gets an image into the store, with progress.
func (a *app) pull(ctx context.Context, l *datadir.Layout, ref string, policy image.Policy) (*image.Image, error) {
	store, err := image.Open(l.Images())
	if err != nil {
		return nil, err
	}
	p := a.ui.Progress()
	defer p.Done()
	return store.Pull(ctx, ref, image.PullOptions{Policy: policy, Progress: pullProgress(p, ref)})
}

// start starts a VM and prints its warnings.
func (a *app) start(ctx context.Context, c *api.Client, req api.RunRequest) (api.VM, error) {
	p := a.ui.Progress()
	p.Set("starting "+req.Image, 0, 0)
	defer p.Done()
	begin := time.Now()
	vm, err := c.Run(ctx, req)
	p.Done()
	switch {
	case err == nil:
		a.warn(vm)
	case ctx.Err() != nil:
		a.settle(ctx, c, func(vm api.VM) bool {
			if vm.Created.Before(begin) || vm.Image != req.Image {
				return false
			}
			// Without a name it may be somebody else's; one that runs is.
			return vm.Name == req.Name || (req.Name == "" && vm.State != api.StateRunning)
		})
	}
	return vm, err
}

// runForeground starts a VM and stays with its process until that has ended.
func (a *app) runForeground(ctx context.Context, c *api.Client, req api.RunRequest) error {
	vm, err := a.start(ctx, c, req)
	if err != nil {
		return err
	}
	// From here on signals are the process's.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	a.intr.forward(a.toProcess(ctx, cancel, func(name string) error { return c.Kill(ctx, vm.ID, name) }))

	code, err := a.follow(ctx, c, vm)
	if req.AutoRemove {
		// The supervisor would do it, but a moment later; who reads the exit code
		// expects that nothing is left. The context may have ended.
		rctx, done := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer done()
		if rerr := c.Remove(rctx, vm.ID, true); rerr != nil && !isCode(rerr, api.CodeNotFound) {
			err = errors.Join(err, fmt.Errorf("remove %s: %w", vm.Name, rerr))
		}
	}
	switch {
	case err != nil:
		return err
	case code != 0:
		return exitStatus(code)
	}
	return nil
}

func isCode(err error, code api.Code) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Code == code
}
