package jail

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// envUser makes the test binary ask for a jail as it is.
const envUser = "FCVM_TEST_JAIL_USER"

func TestMain(m *testing.M) {
	if os.Getenv(envUser) != "" {
		_, err := ThisHost()
		fmt.Println(err)
		return
	}
	os.Exit(m.Run())
}

// config is of a VM whose programs are there, and do nothing.
func config(t *testing.T) Config {
	t.Helper()
	// Short, for sockets.
	dir, err := os.MkdirTemp("", "jl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := Config{
		Dir: filepath.Join(dir, "vms", "0123456789ab"), ID: "0123456789ab",
		Firecracker: filepath.Join(dir, "firecracker"), Jailer: filepath.Join(dir, "jailer"),
		Limits: Limits{MemoryBytes: 256 << 20, CPUs: 2},
		Host:   &Host{Claims: filepath.Join(dir, "users"), Cgroup: filepath.Join(dir, "cgroup")},
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{c.Firecracker, c.Jailer} {
		if err := os.WriteFile(p, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func newJail(t *testing.T, c Config) *Jail {
	t.Helper()
	j, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Close)
	return j
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
}

// TestLayout holds where the jailer of 1.16 makes the root, and what it is told.
func TestLayout(t *testing.T) {
	c := config(t)
	// The jailer follows links before it takes the name.
	versioned := c.Firecracker + "-v1.16.1-x86_64"
	if err := errors.Join(os.Rename(c.Firecracker, versioned), os.Symlink(versioned, c.Firecracker)); err != nil {
		t.Fatal(err)
	}
	j := newJail(t, c)
	if want := c.Dir + "/jail/firecracker-v1.16.1-x86_64/0123456789ab/root"; j.Root() != want {
		t.Errorf("the root is %s, want %s", j.Root(), want)
	}
	if fi, err := os.Stat(j.Root()); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("root: %v, %v", fi, err)
	}
	if got := Roots(c.Dir); !slices.Equal(got, []string{j.Root()}) {
		t.Errorf("Roots = %q", got)
	}
	cmd := j.Command("--api-sock", "api.sock")
	want := []string{
		c.Jailer, "--id", "0123456789ab", "--exec-file", versioned, "--uid", "1900000000", "--gid", "1900000000",
		"--chroot-base-dir", c.Dir + "/jail", "--cgroup-version", "2", "--parent-cgroup", "fcvm",
		"--cgroup", "memory.max=402653184", "--cgroup", "cpu.max=300000 100000", "--cgroup", "pids.max=18",
		"--", "--api-sock", "api.sock",
	}
	if !slices.Equal(cmd.Args, want) {
		t.Errorf("the jailer is told\n%q, want\n%q", cmd.Args, want)
	}
	const namespaces = unix.CLONE_NEWPID | unix.CLONE_NEWNET
	if a := cmd.SysProcAttr; !a.Setsid || a.Cloneflags != namespaces {
		t.Errorf("attributes %+v", a)
	}
	c.Host.Cgroup = ""
	if args := newJail(t, c).Command().Args; slices.Contains(args, "--cgroup") {
		t.Errorf("without cgroups it is told %q", args)
	}
}

// A VM of a directory that looks like a pattern has a jail of its own.
func TestRootsOfAnOddDirectory(t *testing.T) {
	c := config(t)
	c.Dir = filepath.Join(filepath.Dir(c.Dir), "a[b]*?")
	if err := os.Mkdir(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if got, j := Roots(c.Dir), newJail(t, c); len(got) != 0 || len(Roots(c.Dir)) != 1 {
		t.Errorf("Roots = %q, then %q; the root is %s", got, Roots(c.Dir), j.Root())
	}
}

func TestBadConfig(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no jailer":      {func(c *Config) { c.Jailer = "" }, "fcvm setup --engine firecracker"},
		"bad id":         {func(c *Config) { c.ID = "a_b" }, `"a_b"`},
		"no firecracker": {func(c *Config) { c.Firecracker = "/no-such" }, "/no-such"},
	} {
		t.Run(name, func(t *testing.T) {
			conf := config(t)
			c.change(&conf)
			if _, err := New(conf); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("New = %v", err)
			}
			if _, err := os.Lstat(filepath.Join(conf.Dir, "jail")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left: %v", err)
			}
		})
	}
}

// No two VMs have a user in common, for as long as anybody holds the claim.
func TestUsers(t *testing.T) {
	c := config(t)
	a, b := newJail(t, c), newJail(t, c)
	if a.User() == 0 || a.User() == b.User() {
		t.Fatalf("users %d and %d", a.User(), b.User())
	}
	// As a VM inherits it.
	fd, err := unix.Dup(int(a.Claim().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	a.Close()
	if d := newJail(t, c); d.User() == a.User() {
		t.Errorf("user %d was given away while a VM has it", d.User())
	}
	unix.Close(fd)
	if d := newJail(t, c); d.User() != a.User() {
		t.Errorf("user %d was not used again, but %d", a.User(), d.User())
	}
}

func TestLink(t *testing.T) {
	c := config(t)
	j := newJail(t, c)
	src := filepath.Join(filepath.Dir(c.Dir), "rootfs.erofs")
	if err := os.WriteFile(src, []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := j.Link(f, "rootfs"); err != nil {
		t.Fatal(err)
	}
	have, err1 := os.Lstat(filepath.Join(j.Root(), "rootfs"))
	want, err2 := os.Lstat(src)
	if err := errors.Join(err1, err2); err != nil || !os.SameFile(have, want) || have.Mode() != 0o604 {
		t.Errorf("the link is %v, %v", have, err)
	}
	if err := j.Link(f, "rootfs"); err == nil {
		t.Error("a name was given twice")
	}
	if err := j.LinkOrCopy(src, "kernel"); err != nil {
		t.Fatal(err)
	}
	if have, err := os.Lstat(filepath.Join(j.Root(), "kernel")); err != nil || !os.SameFile(have, want) {
		t.Errorf("the kernel was copied: %v", err)
	}
	if err := j.LinkOrCopy("/no/such", "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("LinkOrCopy = %v", err)
	}
}

func TestLinkOverFileSystems(t *testing.T) {
	needRoot(t)
	c := config(t)
	j := newJail(t, c)
	other := t.TempDir()
	if err := unix.Mount("none", other, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(other, 0); err != nil {
			t.Error(err)
		}
	})
	src := filepath.Join(other, "kernel")
	if err := os.WriteFile(src, []byte("kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := j.LinkOrCopy(src, "kernel"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(j.Root(), "kernel"))
	if fi, serr := os.Stat(filepath.Join(j.Root(), "kernel")); err != nil || serr != nil || string(b) != "kernel" || fi.Mode().Perm() != 0o444 {
		t.Errorf("the copy is %q, %v, %v", b, fi, err)
	}
	f, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := j.Link(f, "memory"); err == nil || !strings.Contains(err.Error(), "data directory") {
		t.Errorf("Link = %v", err)
	}
}

func owner(t *testing.T, path string) int {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return int(fi.Sys().(*syscall.Stat_t).Uid)
}

func TestGiveAndMake(t *testing.T) {
	needRoot(t)
	c := config(t)
	j := newJail(t, c)
	log := filepath.Join(c.Dir, "container.log")
	if err := j.Give(log, "container.log"); err != nil {
		t.Fatal(err)
	}
	have, err1 := os.Lstat(log)
	want, err2 := os.Lstat(filepath.Join(j.Root(), "container.log"))
	if err := errors.Join(err1, err2); err != nil || !os.SameFile(have, want) || owner(t, log) != j.User() || have.Mode().Perm() != 0o600 {
		t.Errorf("the log is %v of user %d, %v", have, owner(t, log), err)
	}
	f, err := j.Make("memory", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() != 1<<20 || fi.Mode().Perm() != 0o444 || owner(t, f.Name()) != 0 {
		t.Errorf("the stand-in is %v, %v", fi, err)
	}
	// In a jail that runs, the root is the VM's.
	if err := os.Chown(j.Root(), j.User(), j.User()); err != nil {
		t.Fatal(err)
	}
	n, err := NewFile(j.Root(), "save.state")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if owner(t, n.Name()) != j.User() {
		t.Errorf("the new file is of user %d", owner(t, n.Name()))
	}
}

// What a hostile VM puts in the place of a socket is not followed.
func TestDial(t *testing.T) {
	c := config(t)
	j := newJail(t, c)
	ctx := t.Context()
	if _, err := Dial(ctx, j.Root(), "api.sock"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a socket: %v", err)
	}
	outside := filepath.Join(filepath.Dir(c.Dir), "host.sock")
	l, err := net.Listen("unix", outside)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Symlink(outside, filepath.Join(j.Root(), "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(j.Root(), "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "file"} {
		if _, err := Dial(ctx, j.Root(), name); err == nil || !strings.Contains(err.Error(), "something else") {
			t.Errorf("Dial %s = %v", name, err)
		}
	}
	needRoot(t)
	in, err := j.Listen("uffd.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if got := owner(t, filepath.Join(j.Root(), "uffd.sock")); got != j.User() {
		t.Errorf("the socket is of user %d", got)
	}
	conn, err := Dial(ctx, j.Root(), "uffd.sock")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := Dial(ctx, j.Root(), "uffd.sock"); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
}

func TestRemove(t *testing.T) {
	c := config(t)
	if err := Remove(c.Dir); err != nil {
		t.Errorf("without a jail: %v", err)
	}
	j := newJail(t, c)
	precious := filepath.Join(filepath.Dir(c.Dir), "precious")
	if err := os.MkdirAll(filepath.Join(precious, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	// A VM may leave anything.
	if err := errors.Join(os.Symlink(precious, filepath.Join(j.Root(), "link")), os.MkdirAll(filepath.Join(j.Root(), "a/b"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Remove(c.Dir); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(c.Dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(precious, "sub")); err != nil {
		t.Errorf("something outside is gone: %v", err)
	}
}

func TestRemoveCgroup(t *testing.T) {
	mount := t.TempDir()
	for _, id := range []string{"one", "two"} {
		if err := os.MkdirAll(filepath.Join(mount, "fcvm", id), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeCgroup(mount, "one"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(mount, "fcvm", "two")); err != nil {
		t.Errorf("another VM's: %v", err)
	}
	for range 2 {
		if err := removeCgroup(mount, "two"); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(mount, "fcvm")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the parent is still there: %v", err)
	}
}

func TestCgroupMount(t *testing.T) {
	mount := func(controllers string) string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte(controllers+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	good, bad := mount("cpuset cpu io memory pids"), mount("cpuset memory")
	line := func(dir, kind string) string { return "none " + dir + " " + kind + " rw,nosuid 0 0\n" }
	for name, c := range map[string]struct{ mounts, want, err string }{
		"unified":        {line("/proc", "proc") + line(good, "cgroup2"), good, ""},
		"hybrid":         {line("/sys/fs/cgroup/memory", "cgroup") + line(mount(""), "cgroup2"), "", `cannot limit "memory"`},
		"one is missing": {line(bad, "cgroup2"), "", `cannot limit "cpu"`},
		"old":            {line("/sys/fs/cgroup/memory", "cgroup"), "", "there is no cgroup v2: boot with"},
		"the first":      {line(bad, "cgroup2") + line(good, "cgroup2"), "", "cannot limit"}, // the jailer takes that
		"empty":          {"\n", "", "no cgroup v2"},
	} {
		got, err := cgroupMount(strings.NewReader(c.mounts))
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestOnlyRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		_, err := ThisHost()
		if !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "run fcvm as root") {
			t.Errorf("ThisHost = %v", err)
		}
		return
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envUser + "=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "no jail: only root can make one; run fcvm as root, or without --jail") {
		t.Errorf("as another user: %q, %v", out, err)
	}
}
