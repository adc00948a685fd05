//go:build linux

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"fcvm/internal/datadir"
)

// TestScripts runs the specification of all that needs no VM.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			// The runtime directory is derived from the data directory; a supervisor
			// that a script starts by mistake would be found there.
			l, err := datadir.Open(filepath.Join(env.WorkDir, "data"))
			if err != nil {
				return err
			}
			env.Setenv(datadir.EnvDir, l.Dir)
			env.Setenv("HOME", env.WorkDir)
			if v, ok := os.LookupEnv("XDG_RUNTIME_DIR"); ok {
				env.Setenv("XDG_RUNTIME_DIR", v)
			}
			env.Defer(func() {
				if _, err := os.Lstat(l.Socket()); err == nil {
					t.Errorf("a script started a supervisor: %s", l.Socket())
				}
				_ = os.RemoveAll(l.Runtime)
				// The one that version.txtar names.
				if other, err := datadir.Open(filepath.Join(env.WorkDir, "other")); err == nil {
					_ = os.RemoveAll(other.Runtime)
				}
			})
			tb := env.T().(testing.TB) //nolint:forcetypeassert // testscript.Run passes testing.T
			ociDir(tb, filepath.Join(env.WorkDir, "tiny"), "cmd")
			ociDir(tb, filepath.Join(env.WorkDir, "nocommand"))
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// exits CODE PROGRAM…: runs it, and wants this exit code.
			"exits": exits,
			// setup makes the guest look as if `fcvm setup` had run.
			"setupguest": func(ts *testscript.TestScript, _ bool, _ []string) {
				setUpGuest(t, filepath.Join(ts.Getenv(datadir.EnvDir), "guest"))
			},
		},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	ts.Logf("[stdout]\n%s[stderr]\n%s", ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if (got == want) == neg {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}
