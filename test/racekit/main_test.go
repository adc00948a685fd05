//go:build linux

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/uffd/uffdtest"
)

func TestMain(m *testing.M) {
	pstest.Main()
	os.Exit(m.Run())
}

func TestParse(t *testing.T) {
	for args, want := range map[string]string{
		"":                                   "want a PROGRAM",
		"-- prog {mem}":                      "want {socket}",
		"-shape round -- prog {socket}":      `unknown shape "round"`,
		"-run ( -- prog {socket}":            "missing closing",
		"-colour -- prog {socket}":           "colour",
		"-- prog {socket} {mem}":             "",
		"-list":                              "",
		"-ops 0 -seed 7 prog -x={socket}":    "",
		"-shape template -- prog {socket} x": "",
	} {
		o, err := parse(strings.Fields(args))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %+v, %v, want %q", args, o, err, want)
		}
	}
	o, err := parse([]string{"--", "prog", "--at={socket}", "{template}"})
	if err != nil || len(o.shapes) != 2 || len(o.command) != 3 {
		t.Errorf("got %+v, %v", o, err)
	}
}

func TestRun(t *testing.T) {
	uffdtest.Require(t)
	binary := filepath.Join(t.TempDir(), "uffd_handler")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "fcvm/cmd/uffd_handler").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs the go command")
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// One that ends in the middle.
	mortal := filepath.Join(t.TempDir(), "mortal")
	script := "#!/bin/sh\n" + binary + " \"$@\" & sleep 0.5; kill $!; wait; exit 3\n"
	if err := os.WriteFile(mortal, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		want []string
		ok   bool
	}{
		{"-run SamePage|Histories -ops 1 -- PROG {socket} {mem}", []string{"ok    anonymous  SamePage", "ok    anonymous  Histories", "operations"}, true},
		{"-run ^SamePage -- PROG {socket} {mem} --policy share --template {template}", []string{"ok    anonymous  SamePage", "ok    template   SamePage"}, true},
		{"-run SamePage -- PROG {socket} /nonexistent", []string{"FAIL  anonymous  SamePage", "start page server: it ended: exit status 1: uffd_handler: error: open memory file"}, false},
		{"-run Histories -- " + mortal + " {socket} {mem}", []string{"FAIL", "the page server ended: exit status 3"}, false},
		{"-run SamePage -- /nonexistent {socket}", []string{"FAIL", "no such file"}, false},
	} {
		o, err := parse(strings.Fields(strings.ReplaceAll(c.args, "PROG", binary)))
		if err != nil {
			t.Fatal(err)
		}
		var printed bytes.Buffer
		err = run(t.Context(), o, &printed)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v\n%s", c.args, err, &printed)
		}
		for _, w := range c.want {
			if !strings.Contains(printed.String(), w) {
				t.Errorf("%s: printed %s, want %q", c.args, &printed, w)
			}
		}
	}
}

func TestList(t *testing.T) {
	var b bytes.Buffer
	list(&b)
	if !strings.Contains(b.String(), "TemplateWhole (template memory)\n    ") {
		t.Errorf("printed %s", &b)
	}
}
