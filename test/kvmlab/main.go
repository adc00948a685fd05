//go:build linux

// Kvmlab runs a command with a real /dev/kvm, on machines that have none.
//
//	kvmlab [flags] COMMAND [ARG...]
//
// QEMU translates a machine with AMD's nested virtualization (TCG, -cpu EPYC), which
// boots Debian's kernel; its module kvm_amd gives that machine a /dev/kvm that works like
// any other, only slower. The command runs there as root, in the same directory, on the
// host's own files: the root file system is the host's, read-only over virtio-9p, under a
// layer in memory. What the command writes is gone afterwards, except in the directories
// that -w names.
//
// The exit code is the command's; 124 when the time was up, 125 for errors of the lab.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	exitTimeout = 124
	exitLab     = 125
)

type options struct {
	memory   int
	cpus     int
	timeout  time.Duration
	writable []string
	env      []string
	console  bool
	xsave    bool
	tty      bool
	// kernelDeb is a package whose kernel is booted, or empty.
	kernelDeb string
	command   []string
}

func main() {
	if os.Getpid() == 1 {
		runInside()
	}
	o, err := parseFlags(os.Args[1:])
	if err != nil {
		os.Exit(2) // package flag has said it
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code, err := runLab(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kvmlab: error:", err)
	}
	os.Exit(code)
}

func parseFlags(args []string) (options, error) {
	o := options{}
	f := flag.NewFlagSet("kvmlab", flag.ContinueOnError)
	f.Usage = func() {
		fmt.Fprintln(f.Output(), "usage: kvmlab [flags] [COMMAND [ARG...]]   (without a command: a shell)")
		f.PrintDefaults()
	}
	f.IntVar(&o.memory, "m", 4096, "memory of the lab in `MIB`")
	f.IntVar(&o.cpus, "cpus", 1, "processors of the lab; with more than one, QEMU 7.2 crashes the VMs inside")
	f.BoolVar(&o.xsave, "xsave", false, "give the processor XSAVE, which Firecracker insists on and its guests must not use")
	f.StringVar(&o.kernelDeb, "kernel-deb", "", "boot the kernel in this Debian package, a `FILE`, instead of Debian's present one")
	f.DurationVar(&o.timeout, "timeout", 20*time.Minute, "end the lab after this `TIME`")
	f.BoolVar(&o.tty, "t", false, "give the command a terminal")
	f.BoolVar(&o.console, "console", false, "show the console of the lab's kernel")
	f.Func("w", "`DIR` of the host that the command may write to, under the same path; repeatable", func(dir string) error {
		dir, err := filepath.Abs(dir)
		o.writable = append(o.writable, dir)
		return err
	})
	f.Func("e", "set `NAME=value` for the command, or pass NAME on; repeatable", func(v string) error {
		if !strings.Contains(v, "=") {
			value, ok := os.LookupEnv(v)
			if !ok {
				return nil
			}
			v += "=" + value
		}
		o.env = append(o.env, v)
		return nil
	})
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.command = f.Args(); len(o.command) == 0 {
		o.command, o.tty = []string{"/bin/sh", "-i"}, true
	}
	return o, nil
}

// passed are the variables that the command inherits, beside FCVM_*.
var passed = []string{"PATH", "HOME", "USER", "LANG", "LC_ALL", "TERM"}

// environ is the command's environment, of this program's.
func (o options) environ(ours []string) []string {
	var env []string
	for _, kv := range ours {
		name, _, _ := strings.Cut(kv, "=")
		// The host's data directory would lie on 9p, where nothing of it works.
		if name != "FCVM_DATA_DIR" && strings.HasPrefix(name, "FCVM_") || slices.Contains(passed, name) {
			env = append(env, kv)
		}
	}
	return append(append(env, "TMPDIR="+tmpDir, "KVMLAB=1"), o.env...)
}

// check refuses what the lab could not see.
func (o options) check() error {
	if fc := os.Getenv("FCVM_FIRECRACKER"); fc != "" {
		if _, err := os.Stat(fc); err != nil {
			return fmt.Errorf("look for FCVM_FIRECRACKER: %w", err)
		}
		for _, dir := range hidden {
			if strings.HasPrefix(fc, dir+"/") {
				return fmt.Errorf("FCVM_FIRECRACKER is %s, and the lab has a %s of its own: put it elsewhere", fc, dir)
			}
		}
	}
	for _, dir := range o.writable {
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			return fmt.Errorf("-w %s: it is no directory", dir)
		}
	}
	return nil
}

var errTimeout = errors.New("the time is up")

// runLab returns the exit code, and an error that a person reads.
func runLab(ctx context.Context, o options) (int, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, errTimeout)
	defer cancel()
	code, err := 0, o.check()
	if err == nil {
		code, err = o.run(ctx)
	}
	switch {
	case err == nil:
		return code, nil
	case errors.Is(context.Cause(ctx), errTimeout):
		return exitTimeout, fmt.Errorf("%w after %v: choose more with -timeout", errTimeout, o.timeout)
	case ctx.Err() != nil:
		return 128 + int(syscall.SIGINT), errors.New("interrupted")
	default:
		return exitLab, err
	}
}
