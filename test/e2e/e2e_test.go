// Package e2e runs fcvm as a user does, against real guests. The scripts in
// testdata are its specification: each gets a data directory of its own, shares
// the guest kernel and the images with the others, and fails when it leaves a
// process, a socket or a mount behind.
package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"fcvm/test/images"
)

func TestMain(m *testing.M) {
	testscript.Main(m, commands())
}

// lab is what all scripts of one run share.
type lab struct {
	bin      string // fcvm, uffd_handler, fcvm-init
	dir      string
	guest    string // a guest directory that `fcvm setup` filled
	images   string // an image directory, filled as scripts pull
	registry string // host:port
}

func TestScripts(t *testing.T) {
	l := newLab(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		Setup:               l.setup,
		Cmds:                l.cmds(),
		Condition:           condition,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// newLab builds the images, serves them from a registry of its own and sets up
// a guest. It skips only where real guests can't run at all, and says why.
func newLab(t *testing.T) *lab {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("no qemu-system-x86_64 here: run `make deps`")
	}
	bin := os.Getenv("FCVM_TEST_BIN")
	if bin == "" {
		t.Skip("FCVM_TEST_BIN names no built binaries: run `make e2e`")
	}
	// The paths of sockets hold 107 bytes, and t.TempDir is long.
	dir, err := os.MkdirTemp("", "fe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l := &lab{bin: bin, dir: dir, guest: filepath.Join(dir, "guest"), images: filepath.Join(dir, "images")}

	setup := exec.Command(filepath.Join(bin, "fcvm"), "setup", "--data-dir", dir)
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("fcvm setup: %v\n%s", err, out)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	l.registry, err = serveImages(ctx, t)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// serveImages pushes the images of the tests to an in-process registry.
func serveImages(ctx context.Context, t *testing.T) (string, error) {
	cache, err := images.CacheDir()
	if err != nil {
		return "", err
	}
	reg, err := images.Serve(ctx)
	if err != nil {
		return "", err
	}
	t.Cleanup(func() { _ = reg.Close() })
	for _, name := range []string{"nginx", "busybox"} {
		img, err := images.Build(ctx, name, cache)
		if err != nil {
			return "", fmt.Errorf("build image %s: %w", name, err)
		}
		if err := reg.Push(ctx, name+":latest", img); err != nil {
			return "", err
		}
		if name != "busybox" {
			continue
		}
		for _, prog := range []string{"memtest", "trap", "echo"} {
			img, err := addProgram(t, img, prog)
			if err != nil {
				return "", err
			}
			if err := reg.Push(ctx, prog+":latest", img); err != nil {
				return "", err
			}
		}
	}
	return reg.Addr(), nil
}

func (l *lab) setup(env *testscript.Env) error {
	// Short, for the sake of sockets, and the script's own.
	data, err := os.MkdirTemp(l.dir, "d")
	if err != nil {
		return err
	}
	for link, target := range map[string]string{"guest": l.guest, "images": l.images} {
		if err := os.Symlink(target, filepath.Join(data, link)); err != nil {
			return err
		}
	}
	env.Setenv("FCVM_DATA_DIR", data)
	env.Setenv("BIN", l.bin)
	env.Setenv("GUEST", l.guest)
	env.Setenv("REGISTRY", l.registry)
	env.Setenv("NGINX", l.registry+"/nginx:latest")
	env.Setenv("BUSYBOX", l.registry+"/busybox:latest")
	env.Setenv("ECHO", l.registry+"/echo:latest")
	env.Setenv("MEMTEST", l.registry+"/memtest:latest")
	env.Setenv("TRAP", l.registry+"/trap:latest")
	env.Setenv("ECHO", l.registry+"/echo:latest")
	env.Setenv("PATH", l.bin+string(os.PathListSeparator)+env.Getenv("PATH"))
	// Everything of this script is found by this word in its environment.
	env.Setenv(markVar, filepath.Base(data)+"."+strconv.Itoa(os.Getpid()))
	env.Values[dataKey{}] = data
	env.Values[markKey{}] = env.Getenv(markVar)
	env.Defer(func() { l.teardown(env, data) })
	return nil
}

type (
	dataKey struct{}
	markKey struct{}
)

// teardown removes the script's VMs, ends its supervisor, and fails the script
// when a process is left that none of the two accounts for.
func (l *lab) teardown(env *testscript.Env, data string) {
	t := env.T().(testing.TB) //nolint:forcetypeassert // testscript.Run passes testing.T
	report(data)
	// Scripts that kill things leave VMs on purpose; what must not be left is
	// anything that fcvm no longer knows of.
	names, err := l.fcvm(env, "ls", "-q")
	if err != nil {
		t.Logf("teardown: fcvm ls: %v", err)
	}
	if vms := strings.Fields(names); len(vms) > 0 {
		if out, err := l.fcvm(env, append([]string{"rm", "-f"}, vms...)...); err != nil {
			t.Errorf("teardown: fcvm rm: %v\n%s", err, out)
		}
	}
	stopSupervisor(t, env.Values[markKey{}].(string))
	if t.Failed() {
		if b, err := os.ReadFile(filepath.Join(data, "serve.log")); err == nil {
			t.Logf("serve.log:\n%s", b)
		}
	}
	if left := marked(env.Values[markKey{}].(string)); len(left) > 0 {
		for _, p := range left {
			t.Errorf("left behind: pid %d: %s", p.pid, p.cmdline)
			p.kill()
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if strings.Contains(string(mounts), data) {
		t.Errorf("a mount below %s was left behind", data)
	}
	if err := os.RemoveAll(data); err != nil {
		t.Error(err)
	}
}

func (l *lab) fcvm(env *testscript.Env, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(l.bin, "fcvm"), args...)
	// The script's environment: a supervisor that this starts carries its mark.
	cmd.Env = env.Vars
	out, err := cmd.Output()
	return string(out), err
}

// report notes every VM that this script's supervisor started, for the line at
// the end of the log that says what really ran.
func report(data string) {
	path := os.Getenv("FCVM_TEST_REPORT")
	if path == "" {
		return
	}
	log, err := os.Open(filepath.Join(data, "serve.log"))
	if err != nil {
		return
	}
	defer log.Close()
	out, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return
	}
	defer out.Close()
	for s := bufio.NewScanner(log); s.Scan(); {
		var engine, accel string
		for _, f := range strings.Fields(s.Text()) {
			if v, ok := strings.CutPrefix(f, "engine="); ok {
				engine = v
			}
			if v, ok := strings.CutPrefix(f, "accel="); ok {
				accel = v
			}
		}
		if engine != "" && accel != "" {
			fmt.Fprintln(out, engine, accel)
		}
	}
}

func condition(cond string) (bool, error) {
	switch cond {
	case "root":
		return os.Geteuid() == 0, nil
	default:
		return false, fmt.Errorf("unknown condition %q", cond)
	}
}

// freePort returns a TCP port that nothing listens on just now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil //nolint:forcetypeassert // of a TCP listener
}
