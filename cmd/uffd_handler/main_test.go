//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
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
)

// envMain makes the test binary uffd_handler itself.
const envMain = "FCVM_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(envMain) != "" {
		main()
		return
	}
	// For every process that is started here, by Launch as well.
	if err := errors.Join(os.Setenv(envMain, "1"), os.Setenv("GORACE", "atexit_sleep_ms=0")); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
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
		third := strings.Contains(first, ".") && !strings.HasPrefix(pkg, "golang.org/x/sys")
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
			cmd := exec.Command("/proc/self/exe", args...)
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
	cmd := exec.Command("/proc/self/exe", append(args, "--ready-fd", "3")...)
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
	out, err := exec.Command("/proc/self/exe", s, mem).CombinedOutput()
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

func launchConfig(t *testing.T) pageserver.LaunchConfig {
	t.Helper()
	d := dir(t)
	return pageserver.LaunchConfig{
		Binary: "/proc/self/exe", Dir: d, Runtime: d, MemFile: memFile(t, d, 1<<20), Size: 1 << 20, Policy: pageserver.PolicyShare,
	}
}

// A supervisor launches a page server, goes away, and another one finds it.
func TestLaunchAndAdopt(t *testing.T) {
	c := launchConfig(t)
	lease, err := os.Open(c.MemFile)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	c.Inherit = []*os.File{lease}
	first, err := pageserver.Launch(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(first.Release)
	p, err := pageserver.Adopt(t.Context(), first.Handle())
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.Stats(t.Context())
	if err != nil || st.PID != first.PID() || st.MemBytes != 1<<20 || st.TemplateBytes != 4096 {
		t.Errorf("%+v, %v", st, err)
	}
	template, err := p.Template()
	if err != nil {
		t.Fatal(err)
	}
	defer template.Close()
	if fi, err := template.Stat(); err != nil || fi.Size() != 1<<20 {
		t.Errorf("template: %+v, %v", fi, err)
	}
	if _, err := template.WriteAt([]byte{1}, 0); err == nil {
		t.Error("the template was opened for writing")
	}
	var leases int
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID()))
	for _, fd := range fds {
		if name, _ := os.Readlink(fd); name == c.MemFile {
			leases++
		}
	}
	if leases != 2 || err != nil { // its own, and the inherited one
		t.Errorf("it has the memory file open %d times, %v", leases, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Stats(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := p.Stats(t.Context()); err != nil {
		t.Errorf("after one that was called off: %v", err)
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-first.Done()
	if _, err := os.Lstat(p.Socket()); !errors.Is(err, os.ErrNotExist) {
		t.Error("the socket was left behind")
	}
	if _, err := pageserver.Adopt(t.Context(), first.Handle()); err == nil || !strings.Contains(err.Error(), "not running") {
		t.Errorf("adopting it again: %v", err)
	}
}

func TestLaunchFails(t *testing.T) {
	c := launchConfig(t)
	c.MemFile = "/nonexistent"
	if _, err := pageserver.Launch(t.Context(), c); err == nil || !strings.Contains(err.Error(), "open memory file: open /nonexistent") {
		t.Errorf("got %v", err)
	}
	c = launchConfig(t)
	c.Size = 4096 // not what the file has
	if _, err := pageserver.Launch(t.Context(), c); err == nil || !strings.Contains(err.Error(), "but the memory file 1048576") {
		t.Errorf("got %v", err)
	}
	c.Binary = "/nonexistent"
	if _, err := pageserver.Launch(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
	c = launchConfig(t)
	c.Binary = "/bin/cat" // never says that it is ready, and fails
	if _, err := pageserver.Launch(t.Context(), c); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("got %v", err)
	}
}

func TestLaunchTellsHowItEnded(t *testing.T) {
	p, err := pageserver.Launch(t.Context(), launchConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Release)
	if p.Err() != nil {
		t.Errorf("it runs, and %v", p.Err())
	}
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("got %v", err)
	}
}
