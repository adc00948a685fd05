//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra/doc"

	"fcvm/internal/metrics"
	"fcvm/internal/ui"
)

var update = flag.Bool("update", false, "write docs/cli instead of comparing it")

const docsDir = "../../docs/cli"

// TestDocs holds docs/cli to what the commands say of themselves. `make docs`
// writes it.
func TestDocs(t *testing.T) {
	dir := t.TempDir()
	root := newRoot(&app{ui: ui.New(os.Stdout, os.Stderr)})
	root.InitDefaultCompletionCmd()
	root.DisableAutoGenTag = true
	if err := doc.GenMarkdownTree(root, dir); err != nil {
		t.Fatal(err)
	}
	// Help topics are left out of the tree.
	topic, err := os.Create(filepath.Join(dir, "fcvm_exit-codes.md"))
	if err != nil {
		t.Fatal(err)
	}
	exitCodes, _, err := root.Find([]string{"exit-codes"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(doc.GenMarkdown(exitCodes, topic), topic.Close()); err != nil {
		t.Fatal(err)
	}
	want := read(t, dir)
	if *update {
		if err := os.RemoveAll(docsDir); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(docsDir, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff(want, read(t, docsDir)); d != "" {
		t.Errorf("docs/cli is not what the commands say (run `make docs`):\n%s", d)
	}
}

// TestMetricsDocs holds the table in docs/metrics.md to what there is. `make docs`
// writes it.
func TestMetricsDocs(t *testing.T) {
	const file, head = "../../docs/metrics.md", "| metric | type | labels | |\n| --- | --- | --- | --- |\n"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text, got, ok := strings.Cut(string(b), head)
	if !ok {
		t.Fatalf("%s has no table", file)
	}
	var want strings.Builder
	for _, f := range metrics.Families() {
		fmt.Fprintf(&want, "| `%s` | %s | %s | %s |\n", f.Name, f.Type, strings.Join(f.Labels, ", "), f.Help)
	}
	if *update {
		if err := os.WriteFile(file, []byte(text+head+want.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		got = want.String()
	}
	if d := cmp.Diff(want.String(), got); d != "" {
		t.Errorf("docs/metrics.md does not have the metrics that there are (run `make docs`):\n%s", d)
	}
}

// Every command explains itself, and every flag too.
func TestCommandsAreDescribed(t *testing.T) {
	for name, text := range read(t, docsDir) {
		if strings.Contains(text, "### Options\n\n```\n```") || !strings.HasPrefix(text, "## fcvm") {
			t.Errorf("%s has no text", name)
		}
	}
}

func read(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	paths, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(p)] = string(b)
	}
	return files
}
