package guestd

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/guest/proto"
)

func TestParseSignal(t *testing.T) {
	for name, want := range map[string]syscall.Signal{
		"TERM": 15, "SIGTERM": 15, "sigkill": 9, "15": 15, "RTMIN+3": 37, "SIGRTMIN+3": 37, "SIGRTMIN": 34, "64": 64,
		"": 0, "0": 0, "65": 0, "-9": 0, "NOSUCH": 0, "RTMIN+99": 0, "RTMIN+x": 0,
	} {
		got, err := parseSignal(name)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("parseSignal(%q) = %d, %v, want %d", name, got, err, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	c := command{tty: true, hostname: "h", env: []string{"A=1", "HOME=/x", "A=2", "bad", "=bad", "N=a\x00b", "E="}}
	got := environment(c, "/root")
	want := []string{"PATH=" + defaultPath, "HOSTNAME=h", "HOME=/x", "TERM=xterm", "A=2", "E="}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"good": 0o755, "plain": 0o644, "a/plain": 0o755} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		file, path string
		want       string // below dir, or "" with a code
		code       int
	}{
		"in PATH":             {"good", "/no/such:" + dir, "good", 0},
		"relative to PATH":    {"good", ".", "good", 0},
		"relative":            {"./good", "", "good", 0},
		"absolute":            {dir + "/good", "", "good", 0},
		"later in PATH":       {"plain", dir + ":" + dir + "/a", "a/plain", 0},
		"not executable":      {"plain", dir, "", 126},
		"directory":           {"./a", "", "", 126},
		"directory in PATH":   {"a", dir, "", 127},
		"not there":           {"none", dir, "", 127},
		"no PATH":             {"good", "", "", 127},
		"through a file":      {"good/x", "", "", 126},
		"relative, not there": {"./none", "", "", 127},
		"empty":               {"", dir, "", 127},
	} {
		got, err := lookPath(c.file, c.path, dir)
		var e *proto.Error
		switch {
		case c.want != "" && (err != nil || got != filepath.Join(dir, c.want)):
			t.Errorf("%s: got %q, %v", name, got, err)
		case c.want == "" && (!errors.As(err, &e) || e.Code != c.code):
			t.Errorf("%s: got %q, %v, want code %d", name, got, err, c.code)
		}
	}
}

func TestLookUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root becomes another user")
	}
	etc := t.TempDir()
	for name, content := range map[string]string{
		"passwd": "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
		"group":  "web:x:34:\nextra:x:44:web\nlast:x:45:\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for spec, want := range map[string]struct {
		uid, gid int
		groups   []int
		home     string
	}{
		"":          {0, 0, nil, "/root"},
		"web":       {33, 34, []int{44}, "/srv"},
		"33":        {33, 34, []int{44}, "/srv"},
		"web:last":  {33, 45, nil, "/srv"},
		"1234":      {1234, 0, nil, "/"},
		"1234:5678": {1234, 5678, nil, "/"},
		"0:44":      {0, 44, nil, "/root"},
	} {
		got, err := lookUser(etc, spec)
		if err != nil || got.Uid != want.uid || got.Gid != want.gid || !slices.Equal(got.Sgids, want.groups) || got.Home != want.home {
			t.Errorf("%q: got %+v, %v, want %+v", spec, got, err, want)
		}
	}
	for _, spec := range []string{"nobody", "web:nogroup", "-5", "99999999999"} {
		if got, err := lookUser(etc, spec); err == nil {
			t.Errorf("%q: got %+v, want an error", spec, got)
		}
	}
}

func TestRenameHost(t *testing.T) {
	for in, want := range map[string]string{
		"":                                    "10.0.2.15\tnew\n",
		"127.0.0.1 localhost\n":               "127.0.0.1 localhost\n10.0.2.15\tnew\n",
		"10.0.2.15 old\n10.0.0.1 db":          "10.0.0.1 db\n10.0.2.15\tnew\n",
		"# 10.0.2.15 comment\n10.0.2.155 x\n": "# 10.0.2.15 comment\n10.0.2.155 x\n10.0.2.15\tnew\n",
	} {
		if got := renameHost(in, "10.0.2.15", "new"); got != want {
			t.Errorf("renameHost(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestValidHostname(t *testing.T) {
	for name, want := range map[string]bool{
		"web-1": true, "a.b_c": true, strings.Repeat("x", 64): true,
		"": false, "a b": false, "a\nb": false, "a/b": false, strings.Repeat("x", 65): false, "(none)": false,
	} {
		if validHostname(name) != want {
			t.Errorf("validHostname(%q) = %v", name, !want)
		}
	}
}

// Processes that end before anybody waits for them, and many at once.
func TestReaper(t *testing.T) {
	r := NewReaper()
	defer r.Close()
	fork := func(code string) <-chan syscall.WaitStatus {
		t.Helper()
		_, status, err := r.Start(func() (int, error) {
			return syscall.ForkExec("/bin/sh", []string{"sh", "-c", "exit " + code}, &syscall.ProcAttr{})
		})
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	var all []<-chan syscall.WaitStatus
	for range 20 {
		all = append(all, fork("7"))
	}
	for _, c := range all {
		select {
		case ws := <-c:
			if ws.ExitStatus() != 7 {
				t.Errorf("status %v, want 7", ws.ExitStatus())
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a process was not reaped")
		}
	}
	if _, _, err := r.Start(func() (int, error) { return 0, syscall.ENOENT }); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Start = %v, want ENOENT", err)
	}
}
