//go:build linux

package main

import (
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
)

func TestExec(t *testing.T) {
	f := &fake{exec: func(p *fakeProcess) {
		p.write(proto.Stdout, "out\n")
		p.write(proto.Stderr, "err\n")
		p.code = 3
	}}
	l := startFake(t, f)
	r := fcvm(t, l, "not read", "exec", "-e", "A=1", "box", "-w", "/etc", "-u", "app", "sh", "-c", "exit 3", "-u")
	if r.code != 3 || r.out != "out\n" || r.errOut != "err\n" {
		t.Error(r)
	}
	want := api.ExecRequest{Command: []string{"sh", "-c", "exit 3", "-u"}, Env: []string{"A=1"}, WorkDir: "/etc", User: "app"}
	f.look(func() {
		if d := cmp.Diff([]api.ExecRequest{want}, f.execs); d != "" {
			t.Error(d)
		}
	})
}

func TestExecStdin(t *testing.T) {
	f := &fake{exec: func(p *fakeProcess) {
		b, _ := io.ReadAll(p.stdin)
		p.write(proto.Stdout, strings.ToUpper(string(b)))
	}}
	if r := fcvm(t, startFake(t, f), "words\n", "exec", "-i", "box", "cat"); r.code != 0 || r.out != "WORDS\n" {
		t.Error(r)
	}
}

func TestExecFailures(t *testing.T) {
	for _, tt := range []struct {
		name string
		fake *fake
		code int
		want string
	}{
		{"unknown VM", &fake{execErr: &api.Error{Code: api.CodeNotFound, Message: "no such VM: box"}}, 125, "fcvm: error: no such VM: box\n"},
		{"not found", &fake{execErr: &api.Error{Code: api.CodeInvalid, Message: "nope: not found", ExitCode: 127}}, 127, "fcvm: error: nope: not found\n"},
		{"error frame", &fake{exec: func(p *fakeProcess) {
			p.code = -1
			_ = p.frames.Fail(&proto.Error{Code: 126, Message: "/etc: permission denied"})
		}}, 126, "fcvm: error: /etc: permission denied\n"},
		{"VM ends", &fake{exec: func(p *fakeProcess) { p.code = -1 }}, 125, "fcvm: error: lost the process: the VM ended, or the supervisor did\n"},
		{"garbage", &fake{exec: func(p *fakeProcess) {
			p.code = -1
			_ = p.frames.Write(proto.FrameExit, []byte("long garbage"))
		}}, 125, "fcvm: error: decode exit frame: malformed data from the other side\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := fcvm(t, startFake(t, tt.fake), "", "exec", "box", "true")
			if r.code != tt.code || r.errOut != tt.want {
				t.Error(r)
			}
		})
	}
}

func TestExecForwardsSignals(t *testing.T) {
	f := &fake{exec: func(p *fakeProcess) {
		p.write(proto.Stdout, "ready\n")
		for s := range p.signals {
			p.write(proto.Stdout, s+"\n")
			if s == "TERM" {
				break
			}
		}
		p.code = 9
	}}
	cmd := command(t, startFake(t, f), "exec", "box", "x")
	lines, wait := start(t, cmd)
	lines.until(t, "ready")
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGWINCH, syscall.SIGUSR2, syscall.SIGTERM} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if s == syscall.SIGWINCH {
			continue // about our terminal, not for the process
		}
		if got := lines.next(t); got != signalName(s) {
			t.Fatalf("got %s, want %s", got, signalName(s))
		}
	}
	if r := wait(); r.code != 9 {
		t.Error(r)
	}
}

// The fourth Ctrl-C leaves a process that can't even be killed.
func TestExecGivesUp(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	f := &fake{exec: func(p *fakeProcess) {
		p.write(proto.Stdout, "ready\n")
		for i := range 3 {
			p.write(proto.Stdout, fmt.Sprintf("%d %s\n", i, <-p.signals))
		}
		<-stop
	}}
	cmd := command(t, startFake(t, f), "exec", "box", "x")
	lines, wait := start(t, cmd)
	lines.until(t, "ready")
	for _, want := range []string{"0 INT", "1 INT", "2 KILL", ""} {
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if want != "" && lines.next(t) != want {
			t.Fatalf("want %q", want)
		}
	}
	if r := wait(); r.code != 130 {
		t.Error(r)
	}
}

func TestExecTerminal(t *testing.T) {
	f := &fake{exec: func(p *fakeProcess) {
		p.write(proto.Stdout, "ready\r\n")
		size := <-p.sizes
		for size[0] != 33 { // the size at the start may come again
			size = <-p.sizes
		}
		p.write(proto.Stdout, fmt.Sprintf("size %d %d\r\n", size[0], size[1]))
	}}
	cmd := command(t, startFake(t, f), "exec", "-it", "box", "sh")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 11, Cols: 22})
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	lines := newLines(tty)
	lines.until(t, "ready")
	if err := pty.Setsize(tty, &pty.Winsize{Rows: 33, Cols: 44}); err != nil {
		t.Fatal(err)
	}
	lines.until(t, "size 33 44")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	f.look(func() {
		if req := f.execs[0]; !req.TTY || !req.Stdin || req.Rows != 11 || req.Cols != 22 {
			t.Errorf("%+v", req)
		}
	})
}
