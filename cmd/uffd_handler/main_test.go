//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/pageserver"
	"fcvm/internal/pageserver/pstest"
)

// program is uffd_handler as it is shipped: without cgo, with which it cannot
// confine itself.
var program string

func TestMain(m *testing.M) {
	pstest.Main()
	if dir := os.Getenv(envConfined); dir != "" {
		os.Exit(tryConfined(dir))
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "uh")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "uffd_handler")
		cmd := exec.Command("go", "build", "-buildvcs=false", "-o", program, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build uffd_handler: %v: %s\n", err, out)
			return 1
		}
		return m.Run()
	}())
}

// dir is short enough for sockets.
func dir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "uh")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func memFile(t *testing.T, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "mem.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDependencies holds the program to its budget: one runs beside every
// snapshot in use, and freezes all its clones when it fails.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs the go command")
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for pkg := range strings.FieldsSeq(string(out)) {
		first, _, _ := strings.Cut(pkg, "/")
		third := strings.Contains(first, ".") && !strings.HasPrefix(pkg, "golang.org/x/sys/") &&
			pkg != "golang.org/x/net/bpf" && !strings.HasPrefix(pkg, "github.com/elastic/go-seccomp-bpf")
		if third || pkg == "net/http" || pkg == "crypto/tls" || pkg == "fcvm/internal/supervisor" || pkg == "fcvm/internal/api" {
			t.Errorf("depends on %s", pkg)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args      string
		code      int
		out, errs string
	}{
		{"--help", 0, "SOCKET MEM_FILE", ""},
		{"--version", 0, "uffd_handler ", ""},
		{"", 2, "", "want SOCKET and MEM_FILE, got 0 paths"},
		{"a b c", 2, "", "got 3 paths"},
		{"a b --policy all", 2, "", `unknown policy "all"`},
		{"a b --idle-timeout -1s", 2, "", "negative"},
		{"a b --allow-uid root", 2, "", "numbers of users"},
		{"a b --colour", 2, "", "colour"},
		{"/nonexistent/s MEM", 1, "", "listen on /nonexistent/s"},
		{"DIR/s /nonexistent", 1, "", "open memory file: open /nonexistent: no such file"},
		{"DIR/s DIR", 1, "", "is not a file"},
		{"DIR/s DIR/odd", 1, "", "has 100 bytes, which are not whole pages"},
		{"DIR/s DIR/empty", 1, "", "has 0 bytes"},
		{"MEM MEM", 1, "", "not a socket"},
		{"--policy share DIR/s --template MEM MEM", 1, "", "template"},
		{"DIR/" + strings.Repeat("x", 120) + " MEM", 1, "", "a socket's holds 107"},
	} {
		t.Run(c.args, func(t *testing.T) {
			d := dir(t)
			mem := memFile(t, d, 8192)
			for name, n := range map[string]int{"odd": 100, "empty": 0} {
				if err := os.WriteFile(filepath.Join(d, name), make([]byte, n), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			args := strings.Fields(strings.NewReplacer("DIR", d, "MEM", mem).Replace(c.args))
			cmd := exec.Command(program, args...)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != c.code {
				t.Errorf("exit code %d (%v), want %d", got, err, c.code)
			}
			if !strings.Contains(stdout.String(), c.out) || !strings.Contains(stderr.String(), c.errs) {
				t.Errorf("printed %q and %q, want %q and %q", &stdout, &stderr, c.out, c.errs)
			}
			if c.code != 0 && !strings.HasPrefix(stderr.String(), "uffd_handler: error: ") {
				t.Errorf("printed %q", &stderr)
			}
			if _, err := os.Lstat(filepath.Join(d, "s")); err == nil {
				t.Error("the socket was left behind")
			}
		})
	}
}

// start runs the program by hand and waits until it listens.
func start(t *testing.T, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command(program, append(args, "--ready-fd", "3")...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{w}
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	if line, err := bufio.NewReader(r).ReadString('\n'); line != pageserver.ReadyLine {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("it says %q, %v: %s", line, err, &stderr)
	}
	return cmd, &stderr
}

func TestTermEndsCleanly(t *testing.T) {
	d := dir(t)
	s, c := filepath.Join(d, "s"), filepath.Join(d, "c")
	cmd, stderr := start(t, s, memFile(t, d, 8192), "--control", c, "--policy", "share")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, stderr)
	}
	if !strings.Contains(stderr.String(), "template=/proc/") {
		t.Errorf("the template is not named in %s", stderr)
	}
	for _, path := range []string{s, c} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was left behind", path)
		}
	}
}

func TestSocketInUse(t *testing.T) {
	d := dir(t)
	s, mem := filepath.Join(d, "s"), memFile(t, d, 8192)
	first, _ := start(t, s, mem)
	out, err := exec.Command(program, s, mem).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "in use by another process") {
		t.Errorf("%v: %s", err, out)
	}
	// One that was killed leaves its socket, which the next one replaces.
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	if _, err := os.Lstat(s); err != nil {
		t.Fatal(err)
	}
	start(t, s, mem)
	conn, err := net.Dial("unix", s)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestIdleTimeout(t *testing.T) {
	d := dir(t)
	c := filepath.Join(d, "c")
	cmd, stderr := start(t, filepath.Join(d, "s"), memFile(t, d, 8192), "--control", c, "--idle-timeout", "100ms")
	conn, err := net.Dial("unix", c)
	if err != nil {
		t.Skipf("it ended before this test could connect: %v", err)
	}
	// It is in use, for longer than the timeout.
	time.Sleep(300 * time.Millisecond)
	if _, err := fmt.Fprintln(conn, `{"op":"stats"}`); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, `"policy":"copy"`) {
		t.Fatalf("%q, %v", line, err)
	}
	conn.Close()
	if err := cmd.Wait(); err != nil || !strings.Contains(stderr.String(), "idle") {
		t.Errorf("%v: %s", err, stderr)
	}
}

func TestControl(t *testing.T) {
	d := dir(t)
	c := filepath.Join(d, "c")
	cmd, _ := start(t, filepath.Join(d, "s"), memFile(t, d, 8192), "--control", c)
	conn, err := net.Dial("unix", c)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	for _, x := range [][2]string{
		{`nonsense`, `"error":"parse request`},
		{`{"op":"dance"}`, `"error":"unknown op`},
		{`{"op":"stats"}`, `"mem_bytes":8192`},
		{`{"op":"shutdown"}`, `{}`},
	} {
		if _, err := fmt.Fprintln(conn, x[0]); err != nil {
			t.Fatal(err)
		}
		if line, err := in.ReadString('\n'); err != nil || !strings.Contains(line, x[1]) {
			t.Errorf("%s: %q, %v", x[0], line, err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
