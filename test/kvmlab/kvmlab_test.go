//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"fcvm/internal/guest/agent"
)

func TestEnvironmentOfTheCommand(t *testing.T) {
	o := options{env: []string{"A=b"}}
	got := o.environ([]string{"PATH=/bin", "SECRET=x", "FCVM_QEMU=/q", "FCVM_DATA_DIR=/d", "TMPDIR=/tmp"})
	want := []string{"PATH=/bin", "FCVM_QEMU=/q", "TMPDIR=" + tmpDir, "KVMLAB=1", "A=b"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFlags(t *testing.T) {
	t.Setenv("KVMLAB_TEST", "x=y")
	o, err := parseFlags([]string{"-w", "/a/../b", "-e", "KVMLAB_TEST", "-e", "C=d", "-e", "NOT_THERE_AT_ALL", "ls", "-w", "/"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.writable, []string{"/b"}) || !slices.Equal(o.env, []string{"KVMLAB_TEST=x=y", "C=d"}) || !slices.Equal(o.command, []string{"ls", "-w", "/"}) || o.tty {
		t.Errorf("got %+v", o)
	}
	if o, err = parseFlags(nil); err != nil || !o.tty || len(o.command) == 0 {
		t.Errorf("without a command: %+v, %v", o, err)
	}
}

func TestHiddenFirecrackerIsRefused(t *testing.T) {
	t.Setenv("FCVM_FIRECRACKER", "/proc/self/exe")
	if err := (options{}).check(); err == nil || !strings.Contains(err.Error(), "/proc") {
		t.Errorf("a Firecracker that the lab cannot see: %v", err)
	}
	t.Setenv("FCVM_FIRECRACKER", "/no/such/firecracker")
	if err := (options{}).check(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a Firecracker that is not there: %v", err)
	}
}

func TestLayoutSurvivesTheCommandLine(t *testing.T) {
	want := layout{Writable: map[string]string{"w0": "/a b/ü", "w1": "/c=d"}, Guest: "/g"}
	param, err := want.param()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseLayout("quiet " + param + " panic=-1\n")
	if err != nil || got.Guest != want.Guest || got.Writable["w0"] != "/a b/ü" || got.Writable["w1"] != "/c=d" {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := parseLayout(layoutParam + "!"); err == nil {
		t.Error("nonsense was taken")
	}
}

// lab builds the program and runs it; its first process in the lab is itself.
func lab(t *testing.T, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	if testing.Short() {
		t.Skip("a lab takes longer than -short allows")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("no qemu-system-x86_64 here: run `make deps`")
	}
	exe := filepath.Join(t.TempDir(), "kvmlab")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", exe, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestCommandHasKVMAndTheHostsFiles(t *testing.T) {
	out := t.TempDir()
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := lab(t, "words\n", "-w", out, "sh", "-c", `
		test -c /dev/kvm && grep -q svm /proc/cpuinfo || exit 1
		cat; pwd; echo to stderr >&2
		test -e kvmlab_test.go || exit 2
		echo kept > `+out+`/kept
		echo gone > `+wd+`/gone && cat gone
		exit 7`)
	if stdout != "words\n"+wd+"\ngone\n" || stderr != "to stderr\n" || code != 7 {
		t.Errorf("stdout %q, stderr %q, exit code %d", stdout, stderr, code)
	}
	if b, err := os.ReadFile(filepath.Join(out, "kept")); err != nil || string(b) != "kept\n" {
		t.Errorf("what was written to -w: %q, %v", b, err)
	}
	if _, err := os.Stat("gone"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the host's files were written to: %v", err)
	}
}

func TestFrozenLabIsNoticed(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	go func() { _, _ = io.Copy(io.Discard, theirs) }() // it hears, and says nothing
	c := agent.New(ours)
	defer c.Close()
	frozen := make(chan struct{})
	stop := watch(t.Context(), c, 10*time.Millisecond, func() { close(frozen) })
	defer stop()
	select {
	case <-frozen:
	case <-time.After(time.Minute):
		t.Error("nobody noticed")
	}
}

func TestLabEndsWhenTheTimeIsUp(t *testing.T) {
	_, stderr, code := lab(t, "", "-timeout", "1s", "sleep", "1000")
	if code != exitTimeout || !strings.Contains(stderr, "the time is up") {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
}
