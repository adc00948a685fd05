// Bench measures what fcvm promises, with the built binaries, real guests and
// the CLI that users type: every number beside the floor it is compared with, all
// in one run, because machines differ and this one may be noisy.
//
//	make bench                     # everything, about 15 minutes under TCG
//	make bench BENCHFLAGS=-quick   # fewer rounds
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"fcvm/bench/internal/lab"
	"fcvm/bench/internal/report"
	"fcvm/internal/api"
)

// section is one question, and what answers it.
type section struct {
	name string
	run  func(ctx context.Context, b *bench) error
}

func sections() []section {
	return []section{
		{"clone", benchClone},
		{"many", benchMany},
		{"snapshot", benchSnapshot},
		{"takeover", benchTakeover},
		{"backends", benchBackends},
	}
}

func main() {
	var (
		bin   = flag.String("bin", "bin", "`directory` of fcvm and uffd_handler")
		quick = flag.Bool("quick", false, "fewer rounds and clones")
		only  = flag.String("only", "", "run only sections that match this `regexp`")
		out   = flag.String("json", "", "also write the numbers to this `file`")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, *quick, *only, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench: error:", err)
		stop()
		os.Exit(1)
	}
}

// bench is what sections share.
type bench struct {
	*lab.Lab
	report.Report
	quick bool
}

// stats are those of all VMs and page servers.
func (b *bench) stats(ctx context.Context) (s api.Stats, err error) {
	out, err := b.FCVM(ctx, "stats", "--no-stream", "--json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

func run(ctx context.Context, bin string, quick bool, only, out string) error {
	match, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	l, err := lab.New(ctx, bin)
	if err != nil {
		return err
	}
	defer l.Close()
	b := &bench{Lab: l, quick: quick}
	b.Host = report.Look(ctx)
	if v, err := b.FCVM(ctx, "version"); err == nil {
		b.Host.FCVM = strings.ReplaceAll(v, "\n", "; ")
	}
	fmt.Println(b.Host)
	for _, s := range sections() {
		if !match.MatchString(s.name) {
			continue
		}
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return b.Write(out)
}
