//go:build linux && amd64

// Package doctor finds out what fcvm can do on this host, and names the lines to
// type where it could do more. It changes nothing, and starts nothing that
// outlives it.
package doctor

import (
	"context"
	"os"
	"os/exec"
	"os/user"

	"golang.org/x/sys/unix"

	"fcvm/internal/datadir"
	"fcvm/internal/guest"
	"fcvm/internal/uffd"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/engines"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/firecracker/jail"
	"fcvm/internal/vmm/kvm"
	"fcvm/internal/vmm/qemu"
)

// SchemaVersion is the "version" field of a Report.
const SchemaVersion = 1

// Status of a check.
type Status string

// What a check may find.
const (
	OK Status = "ok"
	// Info is about what is not needed.
	Info Status = "info"
	// Warn means that fcvm works, and is slower, shares less, or lacks a feature.
	Warn Status = "warn"
	// Fail means that VMs cannot run here.
	Fail Status = "fail"
)

// Check is what was found of one thing.
type Check struct {
	// Name such as "userfaultfd", one word for scripts.
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Detail is one sentence: what was found, and what follows from it.
	Detail string `json:"detail"`
	// Fix are lines to type in a shell, comments included; nil where there is
	// nothing to mend.
	Fix []string `json:"fix,omitempty"`
}

// Report is what was found of all, in the order in which it is shown.
type Report struct {
	Version int     `json:"version"`
	Checks  []Check `json:"checks"`
}

// Failed tells whether VMs cannot run here.
func (r Report) Failed() bool {
	for _, c := range r.Checks {
		if c.Status == Fail {
			return true
		}
	}
	return false
}

// Run looks at the host. It takes some 100 ms, most of them QEMU's. A check that
// ctx cuts off fails.
func Run(ctx context.Context, l *datadir.Layout) Report {
	return newHost(l).run(ctx)
}

// host is what the checks ask. Tests replace parts of it.
type host struct {
	// root is where /proc, /sys and /dev are looked for.
	root string
	// user is this user's name, uid the effective one.
	user string
	uid  int
	// tracer tells whether this process may trace what is not its child.
	tracer   bool
	dataDir  string
	guestDir string
	// binDir is where fcvm and its companions are.
	binDir string

	engine      func(context.Context) (vmm.Info, error)
	firecracker func(context.Context) (firecracker.Program, error)
	choose      func(context.Context) (vmm.Choice, error)
	jail        func() error

	kvm       func() error
	uffd      func() error
	attach    func() error
	guest     func(dir string) (*guest.Assets, error)
	output    func(ctx context.Context, name string, arg ...string) ([]byte, error)
	release   func() string
	freeBytes func(dir string) (int64, error)
}

func newHost(l *datadir.Layout) *host {
	all := engines.All(l)
	h := &host{
		root: "/", uid: os.Geteuid(), user: "$USER", dataDir: l.Dir, guestDir: l.Guest(), tracer: mayTrace(),
		engine:      qemu.New(qemu.Options{}).Info,
		firecracker: firecracker.New(firecracker.Options{Dir: l.Firecracker()}).Find,
		choose:      func(ctx context.Context) (vmm.Choice, error) { return vmm.Choose(ctx, all) },
		jail:        func() error { _, err := jail.ThisHost(); return err },
		kvm:         kvm.Usable,
		uffd: func() error {
			fd, err := uffd.Open()
			if err != nil {
				return err
			}
			return fd.Close()
		},
		attach: attach.Probe,
		guest:  guest.Open,
		output: func(ctx context.Context, name string, arg ...string) ([]byte, error) {
			return exec.CommandContext(ctx, name, arg...).Output()
		},
		release:   release,
		freeBytes: freeBytes,
	}
	if u, err := user.Current(); err == nil {
		h.user = u.Username
	}
	if exe, err := os.Executable(); err == nil {
		h.binDir = dirOf(exe)
	}
	return h
}

func (h *host) run(ctx context.Context) Report {
	r := Report{Version: SchemaVersion}
	for _, check := range []func(context.Context) Check{
		h.checkKernel, h.checkPrograms, h.checkGuest, h.checkQEMU, h.checkKVM, h.checkNetwork, h.checkFirecracker, h.checkJail, h.checkEngine,
		h.checkUserfaultfd, h.checkPtrace, h.checkYama, h.checkKSM, h.checkHugePages, h.checkMemory, h.checkOvercommit, h.checkDisk,
	} {
		r.Checks = append(r.Checks, check(ctx))
	}
	return r
}

// mayTrace tells whether this process has CAP_SYS_PTRACE.
func mayTrace() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_PTRACE) != 0
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
