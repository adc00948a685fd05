package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/datadir"
)

// TestMain lets the test binary be the supervisor that Dial starts.
func TestMain(m *testing.M) {
	switch os.Getenv("FCVM_TEST_SERVE") {
	case "":
		os.Exit(m.Run())
	case "serve":
		serveOnce()
	default:
		fmt.Println("serve: cannot: " + os.Getenv("FCVM_TEST_SERVE"))
		os.Exit(1)
	}
}

// serveOnce is `fcvm serve --on-demand --data-dir DIR` of the tests: it answers
// until its one client has gone.
func serveOnce() {
	dir := os.Args[len(os.Args)-1]
	if strings.Join(os.Args[1:], " ") != "serve --on-demand --data-dir "+dir {
		fmt.Println("bad arguments:", os.Args)
		os.Exit(1)
	}
	l := testLayout(filepath.Dir(dir))
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s := NewServer(&fakeBackend{}, slog.New(slog.DiscardHandler))
	seen := false
	s.OnConns(func(n int) {
		if seen = seen || n > 0; seen && n == 0 {
			cancel()
		}
	})
	if os.Getenv(EnvReadyFD) != "3" {
		os.Exit(1)
	}
	_, _ = os.NewFile(3, "ready").WriteString("ready\n")
	if err := s.Serve(ctx, ln); err != nil {
		fmt.Println(err)
	}
}

func testLayout(dir string) *datadir.Layout {
	return &datadir.Layout{Dir: filepath.Join(dir, "data"), Runtime: filepath.Join(dir, "run")}
}

func newLayout(t *testing.T) *datadir.Layout {
	t.Helper()
	dir, err := os.MkdirTemp("", "fa") // short, for the sake of sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l := testLayout(dir)
	for _, d := range []string{l.Dir, l.Runtime} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// fakeBackend answers what the tests ask; everything else panics.
type fakeBackend struct {
	Backend
	exec func(req ExecRequest) (io.ReadWriteCloser, error)
	logs func(begin func() io.Writer) error
	wait func(ctx context.Context) error
	vms  []VM
	err  error
}

func (f *fakeBackend) Info(context.Context) ServerInfo {
	return ServerInfo{Version: "v1", PID: os.Getpid()}
}
func (f *fakeBackend) List(context.Context) []VM { return f.vms }
func (f *fakeBackend) Stop(context.Context, string, time.Duration) error {
	return f.err
}

func (f *fakeBackend) Get(_ context.Context, name string) (VM, error) {
	return VM{Name: name}, f.err
}

func (f *fakeBackend) Wait(ctx context.Context, _ string) (VM, error) {
	return VM{}, f.wait(ctx)
}

func (f *fakeBackend) Exec(_ context.Context, _ string, req ExecRequest) (io.ReadWriteCloser, error) {
	return f.exec(req)
}

func (f *fakeBackend) Logs(_ context.Context, _ string, _ LogsRequest, begin func() io.Writer) error {
	return f.logs(begin)
}

func (f *fakeBackend) Clone(_ context.Context, req CloneRequest, ready func(VM)) error {
	for i := range req.Count {
		ready(VM{Name: fmt.Sprint(i)})
	}
	return f.err
}

// serve serves b and returns a client.
func serve(t *testing.T, b Backend) *Client {
	t.Helper()
	l := newLayout(t)
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(b, slog.New(slog.DiscardHandler)).Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	c, err := Dial(t.Context(), l, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestErrorsArrive(t *testing.T) {
	want := &Error{Code: CodeConflict, Message: "m", Hint: "h", ExitCode: 127}
	b := &fakeBackend{err: want}
	c := serve(t, b)
	err := c.Stop(t.Context(), "a/b c", time.Second)
	var e *Error
	if !errors.As(err, &e) || *e != *want {
		t.Errorf("%#v", err)
	}
	b.err = errors.New("plain")
	if err := c.Stop(t.Context(), "x", time.Second); !errors.As(err, &e) || e.Code != CodeInternal || e.Message != "plain" {
		t.Errorf("%#v", err)
	}
}

func TestNamesAreEscaped(t *testing.T) {
	c := serve(t, &fakeBackend{})
	for _, name := range []string{"a", "a/b", "...", "%2e", "a?b#c", "ü ü"} {
		if vm, err := c.Get(t.Context(), name); err != nil || vm.Name != name {
			t.Errorf("get %q: %q, %v", name, vm.Name, err)
		}
	}
	for _, name := range []string{"", ".", ".."} {
		var e *Error
		if _, err := c.Get(t.Context(), name); !errors.As(err, &e) || e.Code != CodeNotFound {
			t.Errorf("get %q: %v", name, err)
		}
	}
}

func TestEmptyListIsAList(t *testing.T) {
	c := serve(t, &fakeBackend{})
	if vms, err := c.List(t.Context()); err != nil || vms == nil {
		t.Errorf("%v, %v", vms, err)
	}
}

func TestCloneTellsEachAndTheEnd(t *testing.T) {
	b := &fakeBackend{}
	c := serve(t, b)
	var got []string
	vms, err := c.Clone(t.Context(), CloneRequest{Count: 3}, func(v VM) { got = append(got, v.Name) })
	if err != nil || len(vms) != 3 || strings.Join(got, "") != "012" {
		t.Errorf("%v, %v, %v", vms, got, err)
	}
	// An error after the first clones is one, too.
	b.err = &Error{Code: CodeConflict, Message: "port"}
	var e *Error
	if _, err := c.Clone(t.Context(), CloneRequest{Count: 2}, nil); !errors.As(err, &e) || e.Code != CodeConflict {
		t.Errorf("%v", err)
	}
}

func TestExecIsAStream(t *testing.T) {
	near, far := net.Pipe()
	c := serve(t, &fakeBackend{exec: func(req ExecRequest) (io.ReadWriteCloser, error) {
		if len(req.Command) != 1 {
			return nil, &Error{Code: CodeInvalid, Message: "no command"}
		}
		return near, nil
	}})
	var e *Error
	if _, err := c.Exec(t.Context(), "vm", ExecRequest{}); !errors.As(err, &e) || e.Code != CodeInvalid {
		t.Errorf("%v", err)
	}
	st, err := c.Exec(t.Context(), "vm", ExecRequest{Command: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(far, buf); err != nil || string(buf) != "ping" {
		t.Errorf("%q, %v", buf, err)
	}
	if _, err := far.Write([]byte("pong")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(st, buf); err != nil || string(buf) != "pong" {
		t.Errorf("%q, %v", buf, err)
	}
	// When the client leaves, so does the stream to the guest.
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := far.Read(buf); err == nil {
		t.Error("the guest's side is still open")
	}
}

// TestExecEndsWithTheServer: a hijacked connection is not the http package's any
// more, and still must not keep the server from ending.
func TestExecEndsWithTheServer(t *testing.T) {
	l := newLayout(t)
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	defer far.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	b := &fakeBackend{exec: func(ExecRequest) (io.ReadWriteCloser, error) { return near, nil }}
	go func() { done <- NewServer(b, slog.New(slog.DiscardHandler)).Serve(ctx, ln) }()
	c, err := Dial(t.Context(), l, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	st, err := c.Exec(t.Context(), "vm", ExecRequest{Command: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := st.Read(make([]byte, 1)); err == nil {
		t.Error("the stream outlived the server")
	}
}

func TestBrokenLogIsNoEnd(t *testing.T) {
	c := serve(t, &fakeBackend{logs: func(begin func() io.Writer) error {
		_, _ = begin().Write([]byte("half"))
		return errors.New("disk")
	}})
	r, err := c.Logs(t.Context(), "vm", LogsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err == nil || string(b) != "half" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestRequestEndsWithItsClient: what a client asked for is called off when it
// goes away.
func TestRequestEndsWithItsClient(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	c := serve(t, &fakeBackend{wait: func(ctx context.Context) error {
		close(began)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-began; cancel() }()
	if _, err := c.Wait(ctx, "vm"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	<-ended
}

func TestBadRequests(t *testing.T) {
	c := serve(t, &fakeBackend{})
	for _, tt := range []struct{ method, path, body string }{
		{"POST", pathVMs, "{"},
		{"POST", pathVMs, `{"name":1}`},
		{"POST", pathVMs, `"` + strings.Repeat("x", maxBody) + `"`},
		{"POST", "/v1/vms/x/stop?timeout=soon", ""},
		{"POST", "/v1/vms/x/stop?timeout=-1s", ""},
		{"GET", "/v1/vms/x/logs?tail=some", ""},
		{"GET", "/v1/vms/x/logs?follow=perhaps", ""},
		{"GET", "/v1/vms/x/logs?since=yesterday", ""},
		{"DELETE", "/v1/vms/x?force=perhaps", ""},
		{"POST", "/v1/vms/x/exec", "{}"},
		{"GET", "/nosuch", ""},
		{"PATCH", "/v1/vms", ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://fcvm"+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", tt.method, tt.path, err)
			continue
		}
		var e *Error
		if err := decodeError(resp); !errors.As(err, &e) || e.Code != CodeInvalid {
			t.Errorf("%s %s: %v", tt.method, tt.path, err)
		}
		_ = resp.Body.Close()
	}
}

func TestOnlyOwnUserAndRoot(t *testing.T) {
	own := uint32(os.Geteuid())
	for _, tt := range []struct {
		ctx context.Context
		ok  bool
	}{
		{context.WithValue(t.Context(), peerKey{}, own), true},
		{context.WithValue(t.Context(), peerKey{}, uint32(0)), true},
		{context.WithValue(t.Context(), peerKey{}, own+1), false},
		{t.Context(), false}, // not a unix socket
	} {
		if err := admitted(tt.ctx); (err == nil) != tt.ok {
			t.Errorf("peer %v: %v", tt.ctx.Value(peerKey{}), err)
		}
	}
}

// TestForeignUserIsRefused asks as another user, through a socket that is open
// to everybody.
func TestForeignUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to be another user")
	}
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("needs curl")
	}
	l := newLayout(t)
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{filepath.Dir(l.Runtime), l.Runtime, l.Socket()} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(&fakeBackend{}, slog.New(slog.DiscardHandler)).Serve(ctx, ln) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	cmd := exec.Command(curl, "-s", "--unix-socket", l.Socket(), "http://fcvm"+pathInfo)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "not user 65534") {
		t.Errorf("%s, %v", out, err)
	}
}

func TestDialStartsASupervisor(t *testing.T) {
	l := newLayout(t)
	if _, err := Dial(t.Context(), l, DialOptions{}); !errors.Is(err, ErrNoSupervisor) {
		t.Errorf("without Start: %v", err)
	}
	t.Setenv("FCVM_TEST_SERVE", "serve")
	c, err := Dial(t.Context(), l, DialOptions{Start: true, Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	pid := c.Server().PID
	if pid == os.Getpid() || pid == 0 {
		t.Errorf("pid %d", pid)
	}
	_, err = Dial(t.Context(), l, DialOptions{Start: true, Version: "v2"})
	var e *Error
	if !errors.As(err, &e) || !strings.Contains(e.Message, "v1") || !strings.Contains(e.Hint, "fcvm serve --stop") {
		t.Errorf("another version: %v", err)
	}
	_ = c.Close()
	p, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(); err != nil {
		t.Error(err)
	}
}

func TestDialShowsWhyNoneStarts(t *testing.T) {
	l := newLayout(t)
	if err := os.WriteFile(l.ServeLog(), []byte("of long ago\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FCVM_TEST_SERVE", "disk on fire")
	_, err := Dial(t.Context(), l, DialOptions{Start: true})
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeUnavailable || !strings.Contains(e.Message, "disk on fire") ||
		strings.Contains(e.Message, "long ago") || !strings.Contains(e.Hint, l.ServeLog()) {
		t.Errorf("%v", err)
	}
	_, err = Dial(t.Context(), l, DialOptions{Start: true, Binary: "/no/such/fcvm"})
	if err == nil || !strings.Contains(err.Error(), "/no/such/fcvm") {
		t.Errorf("%v", err)
	}
}
