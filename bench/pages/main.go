//go:build linux

// Pages measures the page server, uffd_handler, beside what it is compared with: the
// kernel itself, and a bare loop in C of read and UFFDIO_COPY. Fake VMMs
// (internal/pageserver/pstest) stand for guests, so that it needs no KVM; everything
// takes turns in one run, because machines are noisy, and what is printed are medians of the
// rounds and of the ratios within each.
//
//	make bench-pages                      # about 16 minutes
//	make bench-pages BENCHFLAGS=-quick    # a minute
//	go run ./bench/pages -record FILE     # records anew in which order nginx touches its memory
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"

	"fcvm/bench/internal/report"
	"fcvm/internal/buildinfo"
	"fcvm/internal/pageserver/pstest"
)

// options are those of the command line.
type options struct {
	bin    string
	quick  bool
	only   string
	cells  string
	out    string
	record string
	nice   int
}

// section is one question, and what answers it.
type section struct {
	name string
	run  func(ctx context.Context, b *bench) error
}

func sections() []section {
	return []section{
		{"faults", benchFaults},
		{"storm", benchStorm},
		{"sessions", benchSessions},
		{"pss", benchPSS},
		{"kill", benchKill},
		{"nginx", benchNginx},
	}
}

// bench is what sections share.
type bench struct {
	report.Report
	options
	// handler is the path of uffd_handler, loop that of the C loop, or "".
	handler, loop string
	// dir is removed in the end.
	dir     string
	cell    *regexp.Regexp
	sets    int // of working sets that were handed out
	targets []target
}

func main() {
	pstest.Main()
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "`directory` of uffd_handler and fcvm")
	flag.BoolVar(&o.quick, "quick", false, "fewer rounds and pages")
	flag.StringVar(&o.only, "only", "", "run only sections that match this `regexp`")
	flag.StringVar(&o.cells, "cells", "", "of the section faults, measure only what matches this `regexp`, such as '^1 random .*(b|copy)'")
	flag.StringVar(&o.out, "json", "", "also write the numbers to this `file`")
	flag.IntVar(&o.nice, "nice", 0, "nice `level` of the sessions that take part, where others use the machine as well; -20 needs root")
	flag.StringVar(&o.record, "record", "", "instead, record a real clone's order of faults into this `file`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench-pages: error:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	match, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	cells, err := regexp.Compile(o.cells)
	if err != nil {
		return fmt.Errorf("-cells: %w", err)
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	if o.nice != 0 {
		if err := prefer(os.Getpid(), o.nice); err != nil {
			return err
		}
	}
	if o.record != "" {
		return record(ctx, o.bin, o.record)
	}
	b := &bench{options: o, cell: cells, handler: filepath.Join(o.bin, "uffd_handler")}
	if b.dir, err = os.MkdirTemp("", "fcvm-pages"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	b.Host = report.Look(ctx)
	b.Host.FCVM = "fcvm " + buildinfo.Get()
	fmt.Println(b.Host)
	switch b.loop, err = compileLoop(ctx, b.dir); {
	case errors.Is(err, exec.ErrNotFound):
		fmt.Println("there is no gcc: the C loop, (b), is left out")
	case err != nil:
		return err
	}
	for _, s := range sections() {
		if !match.MatchString(s.name) {
			continue
		}
		fmt.Printf("\n== %s (load %s)\n", s.name, load())
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	b.printTargets()
	return b.Write(o.out)
}
