package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/guest"
	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/proto"
	"fcvm/internal/image"
	"fcvm/internal/network"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
)

const (
	memoryUnit = 2 << 20
	minMemory  = 64 << 20
	maxCPUs    = 255
	// maxVMs bounds a clone request.
	maxVMs = 1000
)

// Run implements [api.Backend].
func (s *Supervisor) Run(ctx context.Context, req api.RunRequest) (api.VM, error) {
	begun := time.Now()
	if err := checkRun(&req); err != nil {
		return api.VM{}, err
	}
	eng, info, err := s.pick(ctx, req)
	if err != nil {
		return api.VM{}, explain(err)
	}
	if err := checkNetwork(&req, info); err != nil {
		return api.VM{}, err
	}
	if req.HugePages && !info.HugePages {
		return api.VM{}, explain(vmm.ErrNoHugePages)
	}
	assets, err := s.assets(req.Kernel)
	if err != nil {
		return api.VM{}, explain(err)
	}
	img, err := s.o.Images.Get(req.ImageID)
	if err != nil {
		return api.VM{}, explain(err)
	}
	spec, err := containerSpec(img, &req)
	if err != nil {
		return api.VM{}, explain(err)
	}
	m, err := s.add(req.Name, runRecord(begun, &req, img, info, assets, spec), nil)
	if err != nil {
		return api.VM{}, err
	}
	if spec.Hostname == "" {
		spec.Hostname = m.name
		m.mu.Lock()
		m.rec.VM.Hostname, m.rec.Container.Hostname = m.name, m.name
		m.mu.Unlock()
	}
	if err := m.boot(ctx, eng, img, assets, spec, &req, begun); err != nil {
		err = m.calledOff(err)
		m.abandon()
		return api.VM{}, explain(err)
	}
	return m.view(), nil
}

func checkRun(req *api.RunRequest) error {
	if req.Name != "" {
		if err := checkName(req.Name); err != nil {
			return err
		}
	}
	if req.ImageID == "" {
		return invalid("the request names no image")
	}
	if req.MemoryBytes < minMemory {
		return invalid("%d bytes of memory are too few: a VM needs at least %d MiB", req.MemoryBytes, minMemory>>20)
	}
	req.MemoryBytes = (req.MemoryBytes + memoryUnit - 1) / memoryUnit * memoryUnit
	if req.CPUs < 1 || req.CPUs > maxCPUs || req.CPUs != float64(int(req.CPUs)) {
		return invalid("%v CPUs: a VM has 1 to %d whole CPUs", req.CPUs, maxCPUs)
	}
	if err := network.Check(req.Ports); err != nil {
		return invalid("publish ports: %v", err)
	}
	if err := checkEnv(req.Env); err != nil {
		return err
	}
	if req.Hostname != "" {
		if err := checkName(req.Hostname); err != nil {
			return invalid("malformed host name %q", req.Hostname)
		}
	}
	if req.BootTimeout < 0 {
		return invalid("boot timeout of %v s", req.BootTimeout)
	}
	return nil
}

// checkNetwork fills in the engine's default, where it has one.
func checkNetwork(req *api.RunRequest, info vmm.Info) error {
	if req.Network == "" && len(info.Networks) > 0 {
		req.Network = info.Networks[0]
	}
	if req.Network == vmm.NetworkNone && len(req.Ports) > 0 {
		return invalid("publish ports: a VM with the network none has no ports")
	}
	if req.Network == "" || slices.Contains(info.Networks, req.Network) {
		return nil
	}
	return invalid("no network %q: the engine %s has %s", req.Network, info.Name, networkNames(info.Networks))
}

// networkNames lists networks for people.
func networkNames(networks []vmm.Network) string {
	var names []string
	for _, n := range networks {
		names = append(names, string(n))
	}
	return strings.Join(names, ", ")
}

func checkEnv(env []string) error {
	for _, e := range env {
		name, _, ok := strings.Cut(e, "=")
		if !ok || name == "" || strings.ContainsRune(e, 0) {
			return invalid("malformed environment variable %q: write NAME=value", e)
		}
	}
	return nil
}

// pick returns the engine of a new VM: the one with this name, or with none the one
// that is best on this host.
func (s *Supervisor) pick(ctx context.Context, req api.RunRequest) (vmm.Engine, vmm.Info, error) {
	name := req.Engine
	if name == "" && (req.Jail || req.HugePages) {
		name = firecracker.Name // no other has them
	}
	if name == "" {
		c, err := vmm.Choose(ctx, s.o.Engines)
		return c.Engine, c.Info, err
	}
	eng, err := s.engine(name)
	if err != nil {
		return nil, vmm.Info{}, err
	}
	info, err := eng.Info(ctx)
	return eng, info, err
}

// engine finds an engine by name.
func (s *Supervisor) engine(name string) (vmm.Engine, error) {
	var known []string
	for _, e := range s.o.Engines {
		if e.Name == name {
			return e.Engine, nil
		}
		known = append(known, e.Name)
	}
	return nil, &api.Error{
		Code:    api.CodeUnavailable,
		Message: fmt.Sprintf("no engine %q; this fcvm has %s", name, strings.Join(known, ", ")),
	}
}

// assets returns what a VM boots; kernel replaces the kernel.
func (s *Supervisor) assets(kernel string) (*guest.Assets, error) {
	a, err := s.o.Guest()
	if err != nil || kernel == "" {
		return a, err
	}
	fi, err := os.Stat(kernel)
	if err != nil {
		return nil, invalid("kernel: %v", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, invalid("kernel %s is not a file", kernel)
	}
	other := *a
	other.Kernel, other.KernelVersion, other.KernelDigest = kernel, "custom", ""
	return &other, nil
}

func containerSpec(img *image.Image, req *api.RunRequest) (proto.ContainerSpec, error) {
	cfg := img.Config.Config
	args, err := image.ResolveCommand(&img.Config, req.Entrypoint, req.ClearEntrypoint, req.Command)
	if err != nil {
		return proto.ContainerSpec{}, err
	}
	spec := proto.ContainerSpec{
		Args: args, Env: mergeEnv(cfg.Env, req.Env), WorkDir: cfg.WorkingDir, User: cfg.User, Hostname: req.Hostname,
		TTY: req.TTY, OpenStdin: req.OpenStdin, StdinOnce: req.OpenStdin && !req.TTY,
	}
	if req.WorkDir != "" {
		spec.WorkDir = req.WorkDir
	}
	if req.User != "" {
		spec.User = req.User
	}
	return spec, nil
}

// mergeEnv lets each variable of over replace one of base.
func mergeEnv(base, over []string) []string {
	at := map[string]int{}
	var out []string
	for _, list := range [][]string{base, over} {
		for _, e := range list {
			name, _, _ := strings.Cut(e, "=")
			if i, ok := at[name]; ok {
				out[i] = e
				continue
			}
			at[name] = len(out)
			out = append(out, e)
		}
	}
	return out
}

func runRecord(begun time.Time, req *api.RunRequest, img *image.Image, info vmm.Info, a *guest.Assets, spec proto.ContainerSpec) record {
	return record{
		VM: api.VM{
			Image: req.Image, ImageDigest: img.ID, Network: req.Network, Engine: info.Name, EngineVersion: info.Version, Accel: info.Accel, CPU: info.CPU,
			CPUs: int(req.CPUs), MemoryBytes: req.MemoryBytes, HugePages: req.HugePages, Hostname: spec.Hostname, Command: spec.Args, Env: spec.Env,
			TTY: spec.TTY, OpenStdin: spec.OpenStdin, AutoRemove: req.AutoRemove, Created: begun, Jailed: req.Jail,
		},
		Machine: machineOf(req, img),
		Guest:   snapshot.Guest{KernelVersion: a.KernelVersion, KernelDigest: a.KernelDigest, InitrdDigest: a.InitrdDigest},
		Container: snapshot.Container{
			Command: spec.Args, Env: spec.Env, User: spec.User, WorkDir: spec.WorkDir, Hostname: spec.Hostname,
			StopSignal: img.Config.Config.StopSignal, TTY: spec.TTY, OpenStdin: spec.OpenStdin,
		},
	}
}

func machineOf(req *api.RunRequest, img *image.Image) vmm.Machine {
	return vmm.Machine{
		MemoryBytes: req.MemoryBytes, CPUs: int(req.CPUs), HugePages: req.HugePages, RootFS: img.RootFS, Network: req.Network,
	}
}

// creation returns the context of a VM's creation: it ends with the request,
// with the supervisor, and when the VM is stopped or removed meanwhile.
func (m *machine) creation(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(m.begun, func() { cancel(context.Cause(m.begun)) })
	return ctx, func() { stop(); cancel(nil) }
}

// calledOff prefers the reason for which a creation was called off to what that
// broke.
func (m *machine) calledOff(err error) error {
	if cause := context.Cause(m.begun); cause != nil {
		return cause
	}
	return err
}

// boot starts the VM and the container's process in it.
func (m *machine) boot(ctx context.Context, eng vmm.Engine, img *image.Image, a *guest.Assets, spec proto.ContainerSpec, req *api.RunRequest, begun time.Time) error {
	ctx, stop := m.creation(ctx)
	defer stop()
	lease, err := m.s.o.Images.Lease(img.ID)
	if err != nil {
		return err
	}
	defer lease.Close()
	ports, err := m.s.claims.Claim(ctx, m.name, req.Ports)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.rec.VM.Ports, m.rec.Container.Ports = ports, ports
	m.mu.Unlock()
	if err := m.prepare(); err != nil {
		return err
	}
	vm, err := eng.Boot(ctx, vmm.BootConfig{
		Place:   vmm.Place{ID: m.id, Dir: m.dir(), Runtime: m.runtime(), Inherit: []*os.File{lease}, Jail: req.Jail},
		Machine: machineOf(req, img),
		Ports:   ports,
		Kernel:  a.Kernel, Initrd: a.Initrd,
		Cmdline: guest.Cmdline + " " + guest.UserNetwork().Cmdline(),
	})
	if err != nil {
		return because(ctx, err)
	}
	if err := m.started(vm); err != nil {
		end(vm)
		return err
	}
	timeout := defaultBoot
	if req.BootTimeout > 0 {
		timeout = time.Duration(req.BootTimeout * float64(time.Second))
	}
	c, err := m.connect(ctx, vm, timeout)
	if err != nil {
		return m.bootFailed(vm, err)
	}
	if err := m.startContainer(ctx, vm, c, spec); err != nil {
		return err
	}
	return m.ready(begun)
}

// bootFailed adds to an error what the guest's console said last.
func (m *machine) bootFailed(vm vmm.VM, err error) error {
	if !errors.As(err, new(errNoAnswer)) && !errors.Is(err, vmm.ErrGone) {
		return err
	}
	msg := fmt.Sprintf("VM %s did not boot: %v", m.name, err)
	if tail := vm.Tail(); tail != "" {
		msg += ":\n" + tail
	}
	return &api.Error{Code: api.CodeUnavailable, Message: msg}
}

func (m *machine) startContainer(ctx context.Context, vm vmm.VM, c *agent.Client, spec proto.ContainerSpec) error {
	ctx, cancel := context.WithTimeoutCause(ctx, agentTimeout, errNoAnswer{agentTimeout})
	defer cancel()
	err := c.Start(ctx, spec)
	if err == nil || errors.As(err, new(*agent.Error)) {
		return err
	}
	// A process that ends at once takes the VM with it, perhaps before the answer
	// is through. Its exit record tells that it was started.
	grace := time.NewTimer(killGrace)
	defer grace.Stop()
	select {
	case <-vm.Done():
		if _, _, found := exitRecord(m.logFile()); found {
			return nil
		}
		err = errEnded
	case <-ctx.Done():
		err = because(ctx, err)
	case <-grace.C:
	}
	return m.bootFailed(vm, err)
}
