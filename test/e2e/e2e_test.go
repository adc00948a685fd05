// Package e2e runs fcvm as a user does, against real guests. The scripts in
// testdata are its specification: each gets a data directory of its own, shares
// the guest kernel and the images with the others, and fails when it leaves a
// process, a socket or a mount behind.
package e2e

import (
	"bufio"
	"context"
	"errors"
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

	"fcvm/internal/testreport"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/firecracker/jail"
	"fcvm/internal/vmm/qemu"
	"fcvm/test/images"
)

func TestMain(m *testing.M) {
	testscript.Main(m, commands())
}

// envPrepared names a directory that command prepare has filled; without it the tests
// run that command themselves.
const envPrepared = "FCVM_E2E_PREPARED"

// envEngine names the engine that runs the VMs: QEMU, or what it says. It is fcvm's own.
const envEngine = "FCVM_ENGINE"

// lab is what all scripts of one run share.
type lab struct {
	bin      string // fcvm, uffd_handler, fcvm-init
	dir      string
	prepared string   // see command prepare
	guest    string   // a guest directory that `fcvm setup` filled
	images   string   // an image directory, filled as scripts pull
	registry string   // host:port
	engine   vmm.Info // what VMs must be run by
}

func TestScripts(t *testing.T) {
	l := newLab(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		Setup:               l.setup,
		Cmds:                l.cmds(),
		Condition:           l.condition,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// newLab builds the images, serves them from a registry of its own and sets up
// a guest. It skips only where real guests can't run at all, and says why.
func newLab(t *testing.T) *lab {
	t.Helper()
	info, err := engineInfo(t.Context())
	if want := os.Getenv(testreport.EnvAccel); want != "" && (err != nil || want != info.Accel) {
		t.Fatalf("the accelerator is %q, and %s=%s; error: %v", info.Accel, testreport.EnvAccel, want, err)
	}
	if errors.Is(err, vmm.ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
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
	l := &lab{bin: bin, dir: dir, images: filepath.Join(dir, "images"), engine: info, prepared: os.Getenv(envPrepared)}
	if err := os.Mkdir(l.images, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	if l.prepared == "" {
		l.prepared = filepath.Join(dir, "prepared")
		if out, err := exec.CommandContext(ctx, "go", "run", "./prepare", "-bin", bin, l.prepared).CombinedOutput(); err != nil {
			t.Fatalf("prepare: %v\n%s", err, out)
		}
	}
	l.guest = filepath.Join(l.prepared, "guest")
	if l.registry, err = l.serveImages(ctx, t); err != nil {
		t.Fatal(err)
	}
	return l
}

// engineInfo tells what VMs are run by.
func engineInfo(ctx context.Context) (vmm.Info, error) {
	if os.Getenv(envEngine) == firecracker.Name {
		return firecracker.New(firecracker.Options{}).Info(ctx)
	}
	return qemu.New(qemu.Options{}).Info(ctx)
}

// serveImages pushes the images of the tests to an in-process registry.
func (l *lab) serveImages(ctx context.Context, t *testing.T) (string, error) {
	reg, err := images.Serve(ctx)
	if err != nil {
		return "", err
	}
	t.Cleanup(func() { _ = reg.Close() })
	for _, name := range []string{"nginx", "busybox", "memtest", "trap", "echo"} {
		img, err := images.ReadOCI(filepath.Join(l.prepared, "oci", name))
		if err != nil {
			return "", err
		}
		if err := reg.Push(ctx, name+":latest", img); err != nil {
			return "", err
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
	env.Setenv("PROGRAMS", filepath.Join(l.prepared, "programs"))
	env.Setenv(envEngine, l.engine.Name)
	for _, name := range []string{"FCVM_QEMU_ACCEL", "FCVM_FIRECRACKER", "FCVM_FIRECRACKER_CPU_TEMPLATE", envPatience} {
		if v, ok := os.LookupEnv(name); ok {
			env.Setenv(name, v)
		}
	}
	env.Setenv("REGISTRY", l.registry)
	env.Setenv("NGINX", l.registry+"/nginx:latest")
	env.Setenv("BUSYBOX", l.registry+"/busybox:latest")
	env.Setenv("MEMTEST", l.registry+"/memtest:latest")
	env.Setenv("TRAP", l.registry+"/trap:latest")
	env.Setenv("ECHO", l.registry+"/echo:latest")
	env.Setenv("PATH", l.bin+string(os.PathListSeparator)+env.Getenv("PATH"))
	// Everything of this script is found by this word in its environment.
	env.Setenv(markVar, filepath.Base(data)+"."+strconv.Itoa(os.Getpid()))
	env.Values[dataKey{}] = data
	env.Values[markKey{}] = env.Getenv(markVar)
	begun := time.Now()
	env.Defer(func() { l.teardown(env, data, begun) })
	return nil
}

type (
	dataKey struct{}
	markKey struct{}
)

// teardown removes the script's VMs, ends its supervisor, and fails the script
// when a process is left that none of the two accounts for.
func (l *lab) teardown(env *testscript.Env, data string, begun time.Time) {
	t := env.T().(testing.TB) //nolint:forcetypeassert // testscript.Run passes testing.T
	l.report(t, env, data, begun)
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

// report notes what the script was run on, and fails it when a VM of its supervisor
// was run by something else.
func (l *lab) report(t testing.TB, env *testscript.Env, data string, begun time.Time) {
	vms := l.startedVMs(t, filepath.Join(data, "serve.log"))
	for _, p := range marked(env.Values[markKey{}].(string)) {
		if !p.isVMM() {
			continue
		}
		// What fcvm says is one thing, what the kernel sees another.
		if kvm, err := testreport.UsesKVM(p.pid); err == nil && kvm != (l.engine.Accel == "kvm") {
			t.Errorf("pid %d uses KVM: %t, and the accelerator is %s: %s", p.pid, kvm, l.engine.Accel, p.cmdline)
		}
	}
	err := testreport.Append(testreport.Entry{
		Suite: "end to end", Test: t.Name(), Engine: l.engine.Name, Version: l.engine.Version, Accel: l.engine.Accel,
		Outcome: testreport.Of(t), VMs: vms, Seconds: time.Since(begun).Seconds(),
	})
	if err != nil {
		t.Error(err)
	}
}

// startedVMs counts the VMs that a supervisor's log tells of.
func (l *lab) startedVMs(t testing.TB, path string) (vms int) {
	log, err := os.Open(path)
	if err != nil {
		return 0 // the script started no supervisor
	}
	defer log.Close()
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
		if engine == "" || accel == "" {
			continue
		}
		vms++
		if engine != l.engine.Name || accel != l.engine.Accel {
			t.Errorf("a VM was run by %s, %s, and not by %s, %s: %s", engine, accel, l.engine.Name, l.engine.Accel, s.Text())
		}
	}
	return vms
}

func (l *lab) condition(cond string) (bool, error) {
	switch cond {
	case "root":
		return os.Geteuid() == 0, nil
	case "ports": // VMs have a network
		return l.engine.Network, nil
	case "jail":
		_, err := jail.ThisHost()
		return l.engine.Name == firecracker.Name && err == nil, nil
	case "qemu":
		return l.engine.Name == qemu.Name, nil
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
