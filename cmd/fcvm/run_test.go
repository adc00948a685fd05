//go:build linux

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
	"fcvm/internal/vmm"
)

func TestRunForeground(t *testing.T) {
	f := &fake{process: func(p *fakeProcess) {
		p.write(proto.Stdout, "out\n")
		p.write(proto.Stderr, "err\n")
		p.write(proto.Stdout, "more")
		p.code = 7
	}}
	l := startFake(t, f)
	r := fcvm(t, l, "", "run", "--rm", ociDir(t, t.TempDir(), "cmd"))
	if r.code != 7 || r.out != "out\nmore" || r.errOut != "err\n" {
		t.Error(r)
	}
	if runs := f.takeRuns(); len(runs) != 1 || !runs[0].AutoRemove {
		t.Errorf("asked for %+v", runs)
	}
	if left := f.List(t.Context()); len(left) > 0 {
		t.Errorf("not removed: %+v", left)
	}
}

// A supervisor that goes away takes nothing of the output with it, and nothing
// comes twice.
func TestRunOutlivesSupervisor(t *testing.T) {
	f := &fake{breakLogs: 2, process: func(p *fakeProcess) {
		for i := range 9 {
			p.write(proto.Stdout, fmt.Sprintln(i))
		}
		p.code = 3
	}}
	r := fcvm(t, startFake(t, f), "", "run", ociDir(t, t.TempDir(), "cmd"))
	if r.code != 3 || r.out != "0\n1\n2\n3\n4\n5\n6\n7\n8\n" || r.errOut != "" {
		t.Error(r)
	}
	f.look(func() {
		if f.logged != 5 {
			t.Errorf("the log was asked for %d times", f.logged)
		}
	})
}

func TestRunDetached(t *testing.T) {
	stop := make(chan struct{})
	f := &fake{process: func(*fakeProcess) { <-stop }}
	defer close(stop)
	l := startFake(t, f)
	r := fcvm(t, l, "", "run", "-d", "--name", "web", ociDir(t, t.TempDir(), "cmd"))
	if r.code != 0 || r.out != "web\n" || r.errOut != "" {
		t.Error(r)
	}
	if r := fcvm(t, l, "", "ls", "-q"); r.out != "web\n" {
		t.Error(r)
	}
}

// Whichever side of the image flags stand on, the supervisor is asked for the
// same; and the command's own flags are its own.
func TestRunArguments(t *testing.T) {
	f := &fake{}
	l := startFake(t, f)
	img := ociDir(t, t.TempDir(), "cmd")
	t.Setenv("FROM_HERE", "here")
	t.Setenv(envEngine, "")
	for _, tt := range []struct {
		args []string
		want api.RunRequest
	}{
		{[]string{img, "--name", "golden"}, api.RunRequest{Name: "golden"}},
		{[]string{"--name", "golden", img}, api.RunRequest{Name: "golden"}},
		{[]string{"-p", "8080:80", img}, api.RunRequest{Ports: []vmm.Port{{HostPort: 8080, GuestPort: 80, Proto: "tcp"}}}},
		{[]string{"--rm", img, "ls", "-la", "/"}, api.RunRequest{AutoRemove: true, Command: []string{"ls", "-la", "/"}}},
		{[]string{img, "--rm", "ls", "--rm", "-p", "x"}, api.RunRequest{AutoRemove: true, Command: []string{"ls", "--rm", "-p", "x"}}},
		{[]string{"-e", "A=1", img, "-e", "B=two words", "-e", "FROM_HERE", "-e", "NOT_SET_HERE"},
			api.RunRequest{Env: []string{"A=1", "B=two words", "FROM_HERE=here"}}},
		{[]string{img, "-m", "300m", "--cpus", "2.0"}, api.RunRequest{MemoryBytes: 300 << 20, CPUs: 2}},
		{[]string{img, "-m", "134217729b"}, api.RunRequest{MemoryBytes: 130 << 20}},
		{[]string{"--entrypoint", "/bin/x", img, "y"}, api.RunRequest{Entrypoint: []string{"/bin/x"}, Command: []string{"y"}}},
		{[]string{"--entrypoint", "", img, "y"}, api.RunRequest{ClearEntrypoint: true, Command: []string{"y"}}},
		{[]string{"-w", "/w", "-u", "app:1", "--hostname", "h", "--engine", "qemu", img},
			api.RunRequest{WorkDir: "/w", User: "app:1", Hostname: "h", Engine: "qemu"}},
		{[]string{img, "-i"}, api.RunRequest{OpenStdin: true}},
		{[]string{img, "-t", "--boot-timeout", "1m30s"}, api.RunRequest{TTY: true, BootTimeout: 90}},
	} {
		tt.want.Image = img
		if tt.want.MemoryBytes == 0 {
			tt.want.MemoryBytes = 512 << 20
		}
		if tt.want.CPUs == 0 {
			tt.want.CPUs = 1
		}
		r := fcvm(t, l, "", append([]string{"run"}, tt.args...)...)
		runs := f.takeRuns()
		if r.code != 0 || len(runs) != 1 {
			t.Fatalf("run %q: %v", tt.args, r)
		}
		got := runs[0]
		if !strings.HasPrefix(got.ImageID, "sha256:") {
			t.Errorf("run %q: image ID %q", tt.args, got.ImageID)
		}
		got.ImageID = ""
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("run %q:\n%s", tt.args, d)
		}
	}
}

func TestRunEngineOfTheEnvironment(t *testing.T) {
	f := &fake{}
	l := startFake(t, f)
	img := ociDir(t, t.TempDir(), "cmd")
	t.Setenv(envEngine, "firecracker")
	for want, args := range map[string][]string{"firecracker": {"run", img}, "qemu": {"run", "--engine", "qemu", img}} {
		r := fcvm(t, l, "", args...)
		if runs := f.takeRuns(); r.code != 0 || len(runs) != 1 || runs[0].Engine != want {
			t.Errorf("%q: %v, asked for %+v", args, r, runs)
		}
	}
}

func TestRunFailures(t *testing.T) {
	img := ociDir(t, t.TempDir(), "cmd")
	for _, tt := range []struct {
		err  *api.Error
		code int
	}{
		{&api.Error{Code: api.CodeConflict, Message: "the name x is taken", Hint: "choose another"}, 125},
		{&api.Error{Code: api.CodeInvalid, Message: "not found: nope", ExitCode: 127}, 127},
		{&api.Error{Code: api.CodeInvalid, Message: "permission denied: /etc", ExitCode: 126}, 126},
	} {
		l := startFake(t, &fake{runErr: tt.err})
		r := fcvm(t, l, "", "run", img)
		want := "fcvm: error: " + tt.err.Message + "\n"
		if tt.err.Hint != "" {
			want += "fcvm: hint: " + tt.err.Hint + "\n"
		}
		if r.code != tt.code || r.errOut != want || r.out != "" {
			t.Errorf("%v: %v", tt.err, r)
		}
	}
}

// A console's tail in an error message must not reach the terminal as it is.
func TestErrorsAreClean(t *testing.T) {
	l := startFake(t, &fake{runErr: &api.Error{Code: api.CodeInternal, Message: "guest said:\n\x1b[2Jgone\r\n\u202etxet"}})
	r := fcvm(t, l, "", "run", ociDir(t, t.TempDir(), "cmd"))
	if strings.ContainsAny(r.errOut, "\x1b\r\u202e") || !strings.Contains(r.errOut, "gone\n") {
		t.Errorf("%q", r.errOut)
	}
}

func TestRunImageWithoutCommand(t *testing.T) {
	f := &fake{}
	l := startFake(t, f)
	r := fcvm(t, l, "", "run", ociDir(t, t.TempDir()))
	if r.code != 125 || !strings.Contains(r.errOut, "no command") || len(f.takeRuns()) != 0 {
		t.Error(r)
	}
}

// start starts a command and returns its output, both streams in one.
func start(t *testing.T, cmd *exec.Cmd) (out *lines, wait func() result) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	return newLines(r), func() result { return finish(t, cmd.Wait(), &bytes.Buffer{}, &bytes.Buffer{}) }
}

func TestRunForwardsSignals(t *testing.T) {
	var got []string
	f := &fake{process: func(p *fakeProcess) {
		p.write(proto.Stdout, "ready\n")
		for s := range p.signals {
			got = append(got, s)
			p.write(proto.Stdout, s+"\n")
			if s == "TERM" {
				break
			}
		}
		p.code = 42
	}}
	l := startFake(t, f)
	cmd := command(t, l, "run", ociDir(t, t.TempDir(), "cmd"))
	lines, wait := start(t, cmd)
	// Before that, a signal ends the start itself.
	lines.until(t, "ready")
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGQUIT, syscall.SIGINT, syscall.SIGTERM} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if want := signalName(s); lines.next(t) != want {
			t.Fatalf("want %s in the output", want)
		}
	}
	r := wait()
	if r.code != 42 || !slices.Equal(got, []string{"INT", "HUP", "USR1", "QUIT", "INT", "TERM"}) {
		t.Errorf("%v: %v", got, r)
	}
}

func TestThirdInterruptKills(t *testing.T) {
	f := &fake{process: func(p *fakeProcess) {
		p.write(proto.Stdout, "ready\n")
		for s := range p.signals {
			p.write(proto.Stdout, s+"\n")
			if s == "KILL" {
				break
			}
		}
		p.code = 137
	}}
	l := startFake(t, f)
	cmd := command(t, l, "run", ociDir(t, t.TempDir(), "cmd"))
	lines, wait := start(t, cmd)
	// Before that, a signal ends the start itself.
	lines.until(t, "ready")
	for _, want := range []string{"INT", "INT", "KILL"} {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if got := lines.next(t); got != want {
			t.Fatalf("got %s, want %s", got, want)
		}
	}
	if r := wait(); r.code != 137 {
		t.Error(r)
	}
}

func TestInterruptWhileStarting(t *testing.T) {
	f := &fake{blockRun: true}
	l := startFake(t, f)
	cmd := command(t, l, "run", ociDir(t, t.TempDir(), "cmd"))
	lines, wait := start(t, cmd)
	<-f.began
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-f.left // the supervisor is told
	lines.until(t, "fcvm: error: interrupted")
	if r := wait(); r.code != 130 {
		t.Error(r)
	}
	if vms := f.List(t.Context()); len(vms) > 0 {
		t.Errorf("left behind: %+v", vms)
	}
}

func TestRunStdin(t *testing.T) {
	f := &fake{process: func(p *fakeProcess) {
		b, _ := io.ReadAll(p.stdin)
		p.write(proto.Stdout, fmt.Sprintf("%d bytes\n", len(b)))
	}}
	l := startFake(t, f)
	r := fcvm(t, l, strings.Repeat("x", 300000), "run", "-i", ociDir(t, t.TempDir(), "cmd"))
	if r.code != 0 || r.out != "300000 bytes\n" {
		t.Error(r)
	}
}

// On a terminal: the size and its changes reach the process, keys are raw (Ctrl-C
// is a byte, nothing is echoed), and the terminal is put back.
func TestRunTerminal(t *testing.T) {
	f := &fake{process: func(p *fakeProcess) {
		size := <-p.sizes
		p.write(proto.Stdout, fmt.Sprintf("size %d %d\r\n", size[0], size[1]))
		size = <-p.sizes
		p.write(proto.Stdout, fmt.Sprintf("size %d %d\r\n", size[0], size[1]))
		b := make([]byte, 3)
		_, _ = io.ReadFull(p.stdin, b)
		p.write(proto.Stdout, fmt.Sprintf("keys %q\r\n", b))
		p.code = 5
	}}
	l := startFake(t, f)
	cmd := command(t, l, "run", "-it", ociDir(t, t.TempDir(), "cmd"))
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 11, Cols: 22})
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	lines := newLines(tty)
	lines.until(t, "size 11 22")
	if err := pty.Setsize(tty, &pty.Winsize{Rows: 33, Cols: 44}); err != nil {
		t.Fatal(err)
	}
	lines.until(t, "size 33 44")
	if _, err := tty.Write([]byte("a\x03b")); err != nil {
		t.Fatal(err)
	}
	lines.until(t, `keys "a\x03b"`)
	if r := finish(t, cmd.Wait(), &bytes.Buffer{}, &bytes.Buffer{}); r.code != 5 {
		t.Error(r)
	}
	if slices.ContainsFunc(lines.seen, func(s string) bool { return strings.HasPrefix(s, "a") }) {
		t.Errorf("keys were echoed: %q", lines.seen)
	}
}

func TestRunNeedsTerminal(t *testing.T) {
	f := &fake{}
	l := startFake(t, f)
	r := fcvm(t, l, "", "run", "-it", ociDir(t, t.TempDir(), "cmd"))
	if r.code != 125 || !strings.Contains(r.errOut, "terminal") || len(f.takeRuns()) != 0 {
		t.Error(r)
	}
}
