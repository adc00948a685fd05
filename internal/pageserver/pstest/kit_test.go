//go:build linux

package pstest

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"fcvm/internal/uffd/uffdtest"
)

var seed = flag.Uint64("seed", 1, "seed of what is random in the race kit")

// setup is a way to run our page server, and the memory of its VMMs.
type setup struct {
	name  string
	shape Shape
	args  []string
	// only limits the scenarios to those that it could make a difference for.
	only string
}

// setups are the ones that fcvm uses, and those that a user may come by.
func setups(binary string) []setup {
	args := func(more string) []string {
		return append([]string{binary, "{socket}", "{mem}"}, strings.Fields(more)...)
	}
	const (
		share  = "--policy share --template {template}"
		replay = " --working-set {dir}/workingset"
	)
	return []setup{
		{"anonymous-copy", Anonymous, args("--policy copy"), ""},
		{"template-share", Template, args(share), ""},
		{"anonymous-copy-replay", Anonymous, args("--policy copy" + replay), "Whole|Remove|ExitInFault"},
		{"template-share-replay", Template, args(share + replay + " --fill 20000000"), "Whole|Remove|ExitInFault"},
		{"anonymous-share", Anonymous, args(share), "Whole|Page$|Remove"},
		{"template-copy", Template, args("--policy copy --template {template}"), "Whole|Page$|Remove"},
	}
}

func (s setup) kit(t testing.TB) *Kit {
	uffdtest.Require(t)
	return &Kit{Command: s.args, Shape: s.shape, Seed: *seed, Logf: t.Logf}
}

// TestScenarios puts our page server into each situation that the kit knows.
func TestScenarios(t *testing.T) {
	for _, s := range setups(handler(t)) {
		t.Run(s.name, func(t *testing.T) {
			for _, c := range Scenarios() {
				if !s.kit(t).Applies(c) || !regexp.MustCompile(s.only).MatchString(c.Name) {
					continue
				}
				t.Run(c.Name, func(t *testing.T) {
					if testing.Short() && c.Name == "ManySessions" {
						t.Skip("-short")
					}
					err := s.kit(t).Run(t.Context(), c)
					if errors.Is(err, ErrSkip) {
						t.Skip(err)
					}
					if err != nil {
						t.Fatal(err)
					}
				})
			}
		})
	}
}

func TestScenariosAreInTheDocs(t *testing.T) {
	b, err := os.ReadFile(filepath.FromSlash("../../../docs/testing.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range Scenarios() {
		if !strings.Contains(string(b), "| `"+s.Name+"` |") {
			t.Errorf("docs/testing.md has no %s", s.Name)
		}
	}
}

// TestHistories compares random histories with a model of memory.
func TestHistories(t *testing.T) {
	ops := 100_000
	if testing.Short() {
		ops = 1
	}
	for _, s := range setups(handler(t)) {
		t.Run(s.name, func(t *testing.T) {
			n, err := s.kit(t).Histories(t.Context(), ops)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d operations", n)
		})
	}
}
