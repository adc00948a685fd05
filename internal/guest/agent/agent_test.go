package agent_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/guesttest"
	"fcvm/internal/guest/proto"
)

func timeout(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// result is what a process sent until its end.
type result struct {
	stdout, stderr string
	code           int
}

func collect(t testing.TB, s io.Reader) result {
	t.Helper()
	var r result
	for {
		f, err := proto.ReadFrame(s, nil)
		if err != nil {
			t.Fatalf("read frame: %v (so far %+v)", err, r)
		}
		switch f.Type {
		case proto.FrameStdout:
			r.stdout += string(f.Payload)
		case proto.FrameStderr:
			r.stderr += string(f.Payload)
		case proto.FrameExit:
			if r.code, err = f.ExitCode(); err != nil {
				t.Fatal(err)
			}
			return r
		default:
			t.Fatalf("unexpected frame of type %d", f.Type)
		}
	}
}

func shell(script string) proto.ExecRequest {
	return proto.ExecRequest{Args: []string{"/bin/sh", "-c", script}}
}

func exec(t testing.TB, c *agent.Client, req proto.ExecRequest) io.ReadWriteCloser {
	t.Helper()
	s, err := c.Exec(timeout(t), req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func send(t testing.TB, s io.Writer, ft proto.FrameType, payload string) {
	t.Helper()
	if err := proto.WriteFrame(s, ft, []byte(payload)); err != nil {
		t.Fatal(err)
	}
}

func TestExec(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		req  proto.ExecRequest
		want result
	}{
		"streams apart": {shell("echo out; echo err >&2"), result{"out\n", "err\n", 0}},
		"exit code":     {shell("exit 42"), result{"", "", 42}},
		"signal":        {shell("kill -TERM $$"), result{"", "", 128 + 15}},
		"environment": {
			proto.ExecRequest{Args: []string{"sh", "-c", "echo $A $B $TERM."}, Env: []string{"A=1", "B=x y", "A=2"}},
			result{"2 x y .\n", "", 0},
		},
		"directory":        {proto.ExecRequest{Args: []string{"pwd"}, WorkDir: dir}, result{dir + "\n", "", 0}},
		"no stdin":         {shell("cat; echo end"), result{"end\n", "", 0}},
		"search in PATH":   {proto.ExecRequest{Args: []string{"true"}}, result{}},
		"terminal":         {proto.ExecRequest{Args: []string{"sh", "-c", "test -t 0 && stty size"}, TTY: true}, result{"24 80\r\n", "", 0}},
		"terminal's size":  {proto.ExecRequest{Args: []string{"stty", "size"}, TTY: true, Rows: 30, Cols: 100}, result{"30 100\r\n", "", 0}},
		"its output stays": {proto.ExecRequest{Args: []string{"sh", "-c", "echo last words"}, TTY: true}, result{"last words\r\n", "", 0}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := collect(t, exec(t, c, tc.req)); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

// As with docker exec, what a process leaves in the background does not hold its
// end up, and can go on writing.
func TestExecLeavesBackground(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	done := filepath.Join(t.TempDir(), "done")
	s := exec(t, c, shell("mkfifo "+done+".fifo; (read x <"+done+".fifo; echo late && echo fine >"+done+") & echo started"))
	stuck := time.AfterFunc(20*time.Second, func() { s.Close() })
	defer stuck.Stop()
	if got := collect(t, s); got != (result{"started\n", "", 0}) {
		t.Errorf("got %+v", got)
	}
	if err := os.WriteFile(done+".fifo", []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	waitFile(t, done)
}

func waitFile(t testing.TB, name string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(name); err == nil && len(b) > 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s was not written", name)
		}
	}
}

func TestExecFails(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("#!/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	noInterpreter := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(noInterpreter, []byte("#!/no/such/shell\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		req  proto.ExecRequest
		code int
	}{
		"not in PATH":        {proto.ExecRequest{Args: []string{"no-such-program"}}, 127},
		"no such file":       {proto.ExecRequest{Args: []string{"/no/such/program"}}, 127},
		"no interpreter":     {proto.ExecRequest{Args: []string{noInterpreter}}, 127},
		"not executable":     {proto.ExecRequest{Args: []string{plain}}, 126},
		"a directory":        {proto.ExecRequest{Args: []string{"/tmp"}}, 126},
		"no directory":       {proto.ExecRequest{Args: []string{"true"}, WorkDir: "/no/such/dir"}, 126},
		"relative dir":       {proto.ExecRequest{Args: []string{"true"}, WorkDir: "tmp"}, 125},
		"nothing to do":      {proto.ExecRequest{}, 125},
		"unknown user":       {proto.ExecRequest{Args: []string{"true"}, User: "nobody-knows"}, 125},
		"empty command":      {proto.ExecRequest{Args: []string{""}}, 127},
		"NUL in an argument": {proto.ExecRequest{Args: []string{"true", "a\x00b"}}, 126},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Exec(timeout(t), tc.req)
			var e *agent.Error
			if !errors.As(err, &e) || e.Code != tc.code {
				t.Errorf("Exec = %v (%T), want code %d", err, err, tc.code)
			}
		})
	}
}

func TestExecStdin(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	s := exec(t, c, proto.ExecRequest{Args: []string{"sha256sum"}, Stdin: true})
	h := sha256.New()
	chunk := bytes.Repeat([]byte("0123456789abcdef"), 2048)
	for range 100 {
		h.Write(chunk)
		send(t, s, proto.FrameStdin, string(chunk))
	}
	send(t, s, proto.FrameStdinEOF, "")
	got := collect(t, s)
	if want := hex(h.Sum(nil)); !strings.HasPrefix(got.stdout, want) || got.code != 0 {
		t.Errorf("got %+v, want %s", got, want)
	}
}

func hex(b []byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, x := range b {
		s.WriteByte(digits[x>>4])
		s.WriteByte(digits[x&15])
	}
	return s.String()
}

func TestExecLargeOutput(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	got := collect(t, exec(t, c, shell("head -c 3000000 /dev/zero; echo over >&2")))
	if len(got.stdout) != 3000000 || got.stderr != "over\n" {
		t.Errorf("got %d bytes and %q", len(got.stdout), got.stderr)
	}
}

func TestExecSignalAndResize(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	s := exec(t, c, proto.ExecRequest{TTY: true, Args: []string{"sh", "-c",
		"trap 'stty size' WINCH; trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done"}})
	waitFor(t, s, "ready")
	if err := proto.WriteFrame(s, proto.FrameResize, proto.ResizePayload(33, 77)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, s, "33 77")
	send(t, s, proto.FrameSignal, "TERM")
	if got := collect(t, s); !strings.Contains(got.stdout, "bye") || got.code != 7 {
		t.Errorf("got %+v, want bye and 7", got)
	}
}

func waitFor(t testing.TB, s io.Reader, text string) {
	t.Helper()
	var all string
	for !strings.Contains(all, text) {
		f, err := proto.ReadFrame(s, nil)
		if err != nil || f.Type != proto.FrameStdout {
			t.Fatalf("wait for %q: frame %v %q, %v (so far %q)", text, f.Type, f.Payload, err, all)
		}
		all += string(f.Payload)
	}
}

// As with docker exec, a process outlives its client.
func TestExecClientGone(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	done := filepath.Join(t.TempDir(), "done")
	s := exec(t, c, proto.ExecRequest{Stdin: true, Args: []string{"sh", "-c",
		// Stdin ends; and output over any window does not block.
		"cat >/dev/null; head -c 2000000 /dev/zero; echo $? >" + done}})
	s.Close()
	waitFile(t, done)
}

// records decodes a guest's log.
func records(t testing.TB, g *guesttest.Guest) (r result, ended bool) {
	t.Helper()
	lr := proto.NewLogReader(bytes.NewReader(g.Log()))
	for {
		rec, err := lr.Next()
		if err != nil {
			return r, ended
		}
		switch rec.Stream {
		case proto.Stdout:
			r.stdout += string(rec.Data)
		case proto.Stderr:
			r.stderr += string(rec.Data)
		case proto.Exit:
			r.code, ended = rec.ExitCode, true
		}
	}
}

func waitExited(t testing.TB, g *guesttest.Guest) {
	t.Helper()
	select {
	case <-g.Server.Exited():
	case <-time.After(20 * time.Second):
		t.Fatal("the container did not end")
	}
}

func TestContainer(t *testing.T) {
	g := guesttest.Start(t)
	c := g.Connect(t)
	// Who attaches before the start misses nothing.
	s, err := c.Attach(timeout(t), proto.AttachRequest{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	dir := filepath.Join(t.TempDir(), "made", "by", "start")
	spec := proto.ContainerSpec{
		Args:    []string{"sh", "-c", "pwd; echo $HOSTNAME; echo oops >&2; cat; exit 9"},
		WorkDir: dir, Hostname: "golden", OpenStdin: true, StdinOnce: true,
	}
	if err := c.Start(timeout(t), spec); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(timeout(t), spec); err == nil {
		t.Error("a second container was started")
	}
	info, err := c.Info(timeout(t))
	if err != nil || !info.ContainerRunning || info.ContainerPID == 0 || info.Hostname != "golden" {
		t.Errorf("Info = %+v, %v", info, err)
	}
	send(t, s, proto.FrameStdin, "typed\n")
	send(t, s, proto.FrameStdinEOF, "")
	want := result{dir + "\ngolden\ntyped\n", "oops\n", 9}
	if got := collect(t, s); got != want {
		t.Errorf("attached client got %+v, want %+v", got, want)
	}
	waitExited(t, g)
	if got, ended := records(t, g); got != want || !ended {
		t.Errorf("log has %+v (ended: %v), want %+v", got, ended, want)
	}
	if !slices.Contains(g.System.Calls(), "kill") {
		t.Error("the other processes were not killed")
	}
	// The end can still be asked for.
	late, err := c.Attach(timeout(t), proto.AttachRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	if got := collect(t, late); got.code != 9 {
		t.Errorf("a late client got %+v", got)
	}
}

func TestContainerSignalAndTTY(t *testing.T) {
	g := guesttest.Start(t)
	c := g.Connect(t)
	if err := c.Signal(timeout(t), "TERM"); err == nil {
		t.Error("a signal before the start was no error")
	}
	s, err := c.Attach(timeout(t), proto.AttachRequest{Stdin: true, Rows: 11, Cols: 22})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := c.Start(timeout(t), proto.ContainerSpec{TTY: true, OpenStdin: true,
		Args: []string{"sh", "-c", "stty size; echo $TERM; read x; echo got $x; exec sleep 100"}}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, s, "11 22\r\nxterm\r\n")
	send(t, s, proto.FrameStdin, "hello\r")
	waitFor(t, s, "got hello")
	for _, bad := range []string{"", "NOSUCH", "0", "99"} {
		if err := c.Signal(timeout(t), bad); err == nil {
			t.Errorf("signal %q was no error", bad)
		}
	}
	if err := c.Signal(timeout(t), "SIGKILL"); err != nil {
		t.Fatal(err)
	}
	if got := collect(t, s); got.code != 128+9 {
		t.Errorf("got %+v, want 137", got)
	}
	waitExited(t, g)
}

func TestContainerThatCannotStart(t *testing.T) {
	g := guesttest.Start(t)
	c := g.Connect(t)
	err := c.Start(timeout(t), proto.ContainerSpec{Args: []string{"/no/such/program"}})
	var e *agent.Error
	if !errors.As(err, &e) || e.Code != 127 {
		t.Fatalf("Start = %v, want code 127", err)
	}
	// It can be tried again.
	if err := c.Start(timeout(t), proto.ContainerSpec{Args: []string{"true"}}); err != nil {
		t.Fatal(err)
	}
	waitExited(t, g)
}

// A supervisor that is killed leaves a container that writes: it must go on, and
// the next supervisor gets the rest of it.
func TestContainerOutlivesConnection(t *testing.T) {
	g := guesttest.Start(t)
	first := g.Connect(t)
	s, err := first.Attach(timeout(t), proto.AttachRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(timeout(t), proto.ContainerSpec{OpenStdin: true,
		Args: []string{"sh", "-c", "echo before; head -c 1000000 /dev/zero; read x; echo $x"}}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, s, "before")
	first.Close()
	second := g.Connect(t)
	s, err = second.Attach(timeout(t), proto.AttachRequest{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	send(t, s, proto.FrameStdin, "after\n")
	if got := collect(t, s); !strings.HasSuffix(got.stdout, "after\n") || got.code != 0 {
		t.Errorf("got %d bytes, code %d", len(got.stdout), got.code)
	}
	waitExited(t, g)
	if got, _ := records(t, g); len(got.stdout) != len("before\n")+1000000+len("after\n") {
		t.Errorf("log has %d bytes of stdout", len(got.stdout))
	}
}

func TestCancel(t *testing.T) {
	c := guesttest.Start(t).Connect(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.Info(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Info = %v, want Canceled", err)
	}
	if err := c.Quiesce(timeout(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Info(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Info while quiesced = %v, want DeadlineExceeded", err)
	}
	if err := c.Unquiesce(timeout(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info(timeout(t)); err != nil {
		t.Error(err)
	}
	c.Close()
	<-c.Done()
	if _, err := c.Info(timeout(t)); !errors.Is(err, agent.ErrClosed) {
		t.Errorf("Info after Close = %v, want ErrClosed", err)
	}
}

func tarOf(t testing.TB, entries ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		content := ""
		if h.Typeflag == 0 {
			content = "content of " + h.Name
			h.Size = int64(len(content))
		}
		h.Uid, h.Gid = os.Getuid(), os.Getgid()
		h.ModTime = time.Unix(1_700_000_000, 0)
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}
