// Command racekit tests a page server, any program that takes Firecracker's
// handshake of the mem backend "Uffd", with VMMs that are processes with a real
// userfaultfd and no guest. It needs no KVM.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/uffd"
)

const usage = `racekit tests a page server with fake VMMs and a real userfaultfd.

Usage:
  go run ./test/racekit [flags] -- PROGRAM ARGS…

In ARGS stand {socket} for where PROGRAM is to listen, {mem} for the snapshot's memory
file, and {template} for an empty memfd of that size, which PROGRAM may fill for
clones that map it; {dir} for an empty directory. It has to end for SIGTERM. For example
  … -- bin/uffd_handler {socket} {mem}
  … -- bin/uffd_handler {socket} {mem} --policy share --template {template}

Flags:
  -shape anonymous|template   memory as Firecracker's, or mapped from the template;
                              default: both where {template} is given, else anonymous
  -run REGEXP, -skip REGEXP   scenarios to run, or to leave out
  -ops N                      random operations in each shape (1000000; 0: none)
  -seed N                     of what is random, as a failure prints it (1)
  -patience D                 when nothing happens for so long, it hangs (30s)
  -keep-going                 goes on after a failure
  -list                       prints the scenarios
`

// errFailed is told already.
var errFailed = errors.New("failed")

type options struct {
	shapes    []pstest.Shape
	run, skip *regexp.Regexp
	ops       int
	seed      uint64
	patience  time.Duration
	keepGoing bool
	list      bool
	command   []string
}

func main() {
	pstest.Main()
	o, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "racekit: error: %v\nracekit: hint: racekit -help\n", err)
		os.Exit(2)
	case o.list:
		list(os.Stdout)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err = run(ctx, o, os.Stdout)
	stop()
	if err != nil {
		if !errors.Is(err, errFailed) {
			fmt.Fprintf(os.Stderr, "racekit: error: %v\n", err)
		}
		os.Exit(1)
	}
}

func parse(args []string) (options, error) {
	o := options{run: regexp.MustCompile(""), skip: regexp.MustCompile("^$")}
	fs := flag.NewFlagSet("racekit", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	shape := fs.String("shape", "", "")
	expression := func(to **regexp.Regexp) func(string) error {
		return func(s string) (err error) {
			*to, err = regexp.Compile(s)
			return err
		}
	}
	fs.Func("run", "", expression(&o.run))
	fs.Func("skip", "", expression(&o.skip))
	fs.IntVar(&o.ops, "ops", 1_000_000, "")
	fs.Uint64Var(&o.seed, "seed", 1, "")
	fs.DurationVar(&o.patience, "patience", 0, "")
	fs.BoolVar(&o.keepGoing, "keep-going", false, "")
	fs.BoolVar(&o.list, "list", false, "")
	if err := fs.Parse(args); err != nil || o.list {
		return o, err
	}
	if o.command = fs.Args(); len(o.command) == 0 {
		return o, errors.New("want a PROGRAM")
	}
	given := strings.Join(o.command, " ")
	if !strings.Contains(given, "{socket}") {
		return o, errors.New("want {socket} among ARGS: VMMs connect there")
	}
	switch s := pstest.Shape(*shape); {
	case s == pstest.Anonymous, s == pstest.Template:
		o.shapes = []pstest.Shape{s}
	case s != "":
		return o, fmt.Errorf("unknown shape %q, want anonymous or template", s)
	case strings.Contains(given, "{template}"):
		o.shapes = []pstest.Shape{pstest.Anonymous, pstest.Template}
	default:
		o.shapes = []pstest.Shape{pstest.Anonymous}
	}
	return o, nil
}

func list(w io.Writer) {
	for _, s := range pstest.Scenarios() {
		only := ""
		if s.Only != "" {
			only = fmt.Sprintf(" (%s memory)", s.Only)
		}
		fmt.Fprintf(w, "%s%s\n    %s\n", s.Name, only, s.About)
	}
	fmt.Fprintf(w, "Histories\n    Random operations of several clones, compared with a model of memory.\n")
}

// run carries out what was asked for, and prints a line for each.
func run(ctx context.Context, o options, w io.Writer) error {
	f, err := uffd.Open()
	if err != nil {
		return err
	}
	f.Close()
	failed := false
	for _, shape := range o.shapes {
		k := &pstest.Kit{Command: o.command, Shape: shape, Seed: o.seed, Patience: o.patience}
		do := func(name string, what func() (string, error)) error {
			if !o.run.MatchString(name) || o.skip.MatchString(name) {
				return nil
			}
			begin := time.Now()
			detail, err := what()
			took := time.Since(begin).Round(10 * time.Millisecond)
			switch {
			case errors.Is(err, pstest.ErrSkip):
				fmt.Fprintf(w, "skip  %-9s  %s: %v\n", shape, name, err)
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case err != nil:
				fmt.Fprintf(w, "FAIL  %-9s  %s  %v\n%v\n", shape, name, took, err)
				if failed = true; !o.keepGoing {
					return errFailed
				}
			default:
				fmt.Fprintf(w, "ok    %-9s  %s  %v%s\n", shape, name, took, detail)
			}
			return nil
		}
		for _, s := range pstest.Scenarios() {
			if !k.Applies(s) {
				continue
			}
			if err := do(s.Name, func() (string, error) { return "", k.Run(ctx, s) }); err != nil {
				return err
			}
		}
		if o.ops > 0 {
			err := do("Histories", func() (string, error) {
				n, err := k.Histories(ctx, o.ops)
				return fmt.Sprintf("  %d operations", n), err
			})
			if err != nil {
				return err
			}
		}
	}
	if failed {
		return errFailed
	}
	return nil
}
