package firecracker

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// vsockSide is Firecracker's side of its vsock: it answers each connection with one
// of answers, and closes it after an empty one.
func vsockSide(t *testing.T, answers ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "v.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, a := range answers {
			c, err := l.Accept()
			if err != nil {
				return
			}
			line, _ := bufio.NewReader(c).ReadString('\n')
			if line != "CONNECT 52\n" {
				t.Errorf("asked %q", line)
			}
			if a != "" {
				_, _ = io.WriteString(c, a)
				_, _ = c.Read(make([]byte, 1)) // until the other side goes
			}
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

// The guest's first bytes come with Firecracker's answer; none of them may be lost.
func TestDialGuestWaitsUntilItListens(t *testing.T) {
	path := vsockSide(t, "", "", "OK 1073741824\nhello")
	c, err := dialGuest(t.Context(), to(path), agentPort, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("read %q, error %v", b, err)
	}
}

func TestDialGuestGivesUp(t *testing.T) {
	ended := make(chan struct{})
	close(ended)
	if _, err := dialGuest(t.Context(), to(vsockSide(t, "")), agentPort, ended); !errors.Is(err, errNotListening) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Millisecond, errors.New("given up"))
	defer cancel()
	if _, err := dialGuest(ctx, to(vsockSide(t, "OK")), agentPort, nil); err == nil || !strings.Contains(err.Error(), "given up") {
		t.Errorf("error %v", err)
	}
	if _, err := dialGuest(t.Context(), to(filepath.Join(t.TempDir(), "none")), agentPort, nil); err == nil {
		t.Error("no error where there is no socket")
	}
	if _, err := dialGuest(t.Context(), to(vsockSide(t, "what?\n")), agentPort, nil); err == nil || !strings.Contains(err.Error(), "what?") {
		t.Errorf("error %v", err)
	}
}

func FuzzReadAnswer(f *testing.F) {
	f.Add("OK 1\nrest")
	f.Add("no")
	f.Fuzz(func(t *testing.T, s string) {
		r := strings.NewReader(s)
		if err := readAnswer(r); err == nil {
			read := s[:len(s)-r.Len()]
			if !strings.HasPrefix(read, "OK ") || strings.Index(read, "\n") != len(read)-1 {
				t.Errorf("%q counts as an answer", read)
			}
		}
	})
}

// to makes connections to a socket.
func to(socket string) dialer {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
}
