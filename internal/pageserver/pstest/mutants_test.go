//go:build linux

package pstest

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// mutant is our page server with a bug, by replacing texts of its source. A text that is
// not found exactly once fails the test: who changes the page server there also
// has to say what the bug looks like now.
type mutant struct {
	name string
	file string // in internal/pageserver
	// edits are pairs of a text and what replaces it.
	edits []string
	// setup it shows in, and the scenario that has to find it.
	setup, scenario string
}

var mutants = []mutant{
	{
		name: "REMOVE after COPY", file: "session.go", setup: "anonymous-copy", scenario: "RemoveBehindFaults",
		// Events are taken in the order in which they were read: a REMOVE when all faults
		// before it are answered.
		edits: []string{
			"			err = s.note(e)\n",
			"			s.late = append(s.late, e)\n",
			"	now := clock()\n	for _, e := range events {\n",
			"	if len(s.queue) == 0 {\n		for _, e := range s.late {\n			_ = s.note(e)\n		}\n		s.late = nil\n	}\n" +
				"	now := clock()\n	for _, e := range events {\n",
			"	returned  int\n}\n",
			"	returned  int\n	late      []uffd.Event\n}\n",
		},
	},
	{
		name: "EAGAIN dropped", file: "serve.go", setup: "anonymous-copy", scenario: "FaultsDuringRemove",
		edits: []string{
			"			s.queue = append(s.queue, fs...)\n			return nil\n",
			"			return nil\n",
		},
	},
	{
		name: "EEXIST without WAKE", file: "serve.go", setup: "template-share", scenario: "RemovedNeighbour",
		edits: []string{
			"			if err := s.fd.Wake(fs[0].addr, s.pageSize); err != nil {\n				return ended(err)\n			}\n			s.answered(fs[:1])\n",
			"			s.answered(fs[:1])\n",
		},
	},
	{
		name: "replay of what was given back", file: "ahead.go", setup: "anonymous-copy-replay", scenario: "RemoveBeforeReplay",
		edits: []string{
			"	for keep < n && !s.ledger.removed(page+keep) {\n",
			"	for keep < n {\n",
		},
	},
	{
		name: "template filled through a mapping", file: "template.go", setup: "template-share", scenario: "TemplateWhole",
		edits: []string{
			"	if _, err := t.file.WriteAt(data, off); err != nil {\n		return fmt.Errorf(\"fill template: %w\", err)\n	}\n",
			"	mapped, err := unix.Mmap(int(t.file.Fd()), off, len(data), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)\n" +
				"	if err != nil {\n		return fmt.Errorf(\"fill template: %w\", err)\n	}\n	copy(mapped, data)\n	_ = unix.Munmap(mapped)\n",
		},
	},
}

// mutantPatience makes a mutant that hangs known soon. That the page server as it is
// passes the same scenarios is for TestScenarios to say.
const mutantPatience = 4 * time.Second

var mutantRuns = flag.Int("mutant-runs", 1, "how often each mutant is run")

// TestMutantsAreKilled proves that the kit finds the bugs that it is there for.
func TestMutantsAreKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	handler(t)
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel() // they wait most of the time
			ill := setups(m.build(t))
			s := ill[slices.IndexFunc(ill, func(s setup) bool { return s.name == m.setup })]
			all := Scenarios()
			c := all[slices.IndexFunc(all, func(c Scenario) bool { return c.Name == m.scenario })]
			killed := 0
			for n := range *mutantRuns {
				k := s.kit(t)
				k.Patience, k.Seed = mutantPatience, *seed+uint64(n)
				begin := time.Now()
				if err := k.Run(t.Context(), c); err != nil {
					killed++
					first, _, _ := strings.Cut(err.Error(), "\npage server")
					t.Logf("after %v: %s", time.Since(begin).Round(time.Millisecond), first)
				}
			}
			if t.Logf("killed in %d of %d runs", killed, *mutantRuns); killed < *mutantRuns {
				t.Errorf("it survived %d of %d runs", *mutantRuns-killed, *mutantRuns)
			}
		})
	}
}

// build builds the page server with the bug.
func (m mutant) build(t *testing.T) string {
	t.Helper()
	source, err := filepath.Abs(filepath.Join("..", m.file))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(m.edits); i += 2 {
		if n := strings.Count(text, m.edits[i]); n != 1 {
			t.Fatalf("%s has this %d times, and the mutant needs it once:\n%s", m.file, n, m.edits[i])
		}
		text = strings.Replace(text, m.edits[i], m.edits[i+1], 1)
	}
	dir := t.TempDir()
	changed, overlay, binary := filepath.Join(dir, m.file), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "uffd_handler")
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {source: changed}})
	if err != nil {
		t.Fatal(err)
	}
	for path, content := range map[string][]byte{changed: []byte(text), overlay: replace} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := build(binary, "-overlay", overlay); err != nil {
		t.Fatal(err)
	}
	return binary
}
