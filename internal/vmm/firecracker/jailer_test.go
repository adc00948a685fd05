package firecracker_test

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/network/tapnet"
	"fcvm/internal/pageserver"
	"fcvm/internal/uffd"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/firecracker/jail"
)

// fakeJailer does what the real one does to its files, user and root, in its order.
func fakeJailer(args []string) {
	if err := becomeJailed(args); err != nil {
		fmt.Fprintln(os.Stderr, "the fake jailer:", err)
		os.Exit(1)
	}
}

func becomeJailed(args []string) error {
	if err := unix.CloseRange(3, math.MaxInt32, 0); err != nil {
		return err
	}
	i := slices.Index(args, "--")
	if i < 0 {
		return errors.New("nothing for Firecracker")
	}
	flags := map[string]string{}
	for j := 0; j+1 < i; j += 2 {
		flags[args[j]] = args[j+1]
	}
	id, program := flags["--id"], flags["--exec-file"]
	uid, err := strconv.Atoi(flags["--uid"])
	if err != nil || flags["--gid"] != flags["--uid"] {
		return fmt.Errorf("user %q, group %q", flags["--uid"], flags["--gid"])
	}
	root := filepath.Join(flags["--chroot-base-dir"], filepath.Base(program), id, "root")
	inside := filepath.Join(root, filepath.Base(program))
	if err := copyFile(program, inside); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(filepath.Join(root, "dev"), 0o755), os.Chown(inside, uid, uid), os.Chown(root, uid, uid)); err != nil {
		return err
	}
	var st unix.Stat_t
	if unix.Stat(uffd.Device, &st) == nil {
		dev := filepath.Join(root, uffd.Device)
		if err := errors.Join(unix.Mknod(dev, unix.S_IFCHR|0o600, int(st.Rdev)), os.Chown(dev, uid, uid)); err != nil {
			return err
		}
	}
	for _, err := range []error{unix.Chroot(root), unix.Chdir("/"), syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)} {
		if err != nil {
			return err
		}
	}
	return unix.Exec("/"+filepath.Base(program), append([]string{filepath.Base(program), "--id", id}, args[i+1:]...), nil)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// newJailedLab has a fake Firecracker with a fake jailer beside it.
func newJailedLab(t *testing.T, o firecracker.Options) *fakeLab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can jail")
	}
	l := newFakeLab(t, "", o)
	o.Binary = filepath.Join(l.dir, "bin", "firecracker")
	if err := os.Mkdir(filepath.Dir(o.Binary), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"firecracker", "jailer"} {
		if err := copyFile(self(t), filepath.Join(filepath.Dir(o.Binary), name)); err != nil {
			t.Fatal(err)
		}
	}
	l.engine = firecracker.NewFakeJailed(o, &jail.Host{Claims: filepath.Join(l.dir, "users")})
	l.jailed = true
	return l
}

// Each way works in a jail, too.
func TestJailedFirecrackerGetsItsMemory(t *testing.T) {
	handler := buildHandler(t)
	for name, policy := range map[string]pageserver.Policy{"share": pageserver.PolicyShare, "copy": pageserver.PolicyCopy, "file": ""} {
		t.Run(name, func(t *testing.T) {
			if err := attach.Probe(); policy == pageserver.PolicyShare && err != nil {
				t.Skip(err)
			}
			l := newJailedLab(t, firecracker.Options{})
			m := l.memory(t, policy, handler)
			one, c1 := l.restore(t, m)
			two, c2 := l.restore(t, m)
			users := map[int]bool{}
			for _, v := range []vmm.VM{one, two} {
				uid := isJailed(t, v)
				if users[uid] {
					t.Errorf("two VMs are of user %d", uid)
				}
				users[uid] = true
			}
			if _, err := askFake(one.Handle().Root, "PUT", 4); err != nil {
				t.Fatal(err)
			}
			for i := range fakeSize / 4096 {
				for _, v := range []vmm.VM{one, two} {
					want := content(i)
					if i == 4 && v == one {
						want = 0x77
					}
					got, err := askFake(v.Handle().Root, "GET", i)
					if err != nil || got != fmt.Sprint(want) {
						t.Fatalf("page %d holds %s, error %v, want %d", i, got, err, want)
					}
				}
			}
			for v, c := range map[vmm.VM]vmm.RestoreConfig{one: c1, two: c2} {
				end(t, v)
				if err := jail.Remove(c.Dir); err != nil {
					t.Error(err)
				}
				if _, err := os.Lstat(filepath.Join(c.Dir, "jail")); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("left of the jail: %v", err)
				}
			}
			if b, err := os.ReadFile(l.mem); err != nil || b[4*4096] != content(4) {
				t.Errorf("the snapshot has changed, or %v", err)
			}
		})
	}
}

func end(t *testing.T, v vmm.VM) {
	t.Helper()
	if err := v.Kill(); err != nil {
		t.Error(err)
	}
	<-v.Done()
}

// isJailed checks what the kernel knows of a VM's process, and returns its user.
func isJailed(t *testing.T, v vmm.VM) int {
	t.Helper()
	h := v.Handle()
	proc := fmt.Sprintf("/proc/%d/", h.PID)
	have, err1 := os.Stat(proc + "root")
	want, err2 := os.Stat(h.Root)
	if err := errors.Join(err1, err2); err != nil || !os.SameFile(have, want) {
		t.Errorf("its root is not %s: %v", h.Root, err)
	}
	for _, ns := range []string{"pid", "net"} {
		mine, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink(proc + "ns/" + ns)
		if err := errors.Join(err1, err2); err != nil || mine == its {
			t.Errorf("its %s namespace is %s, as mine: %v", ns, its, err)
		}
	}
	b, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			f := strings.Fields(ids)
			uid, err := strconv.Atoi(f[0])
			if err != nil || uid == 0 || slices.ContainsFunc(f, func(s string) bool { return s != f[0] }) {
				t.Errorf("its user is %q", ids)
			}
			return uid
		}
	}
	t.Fatal("its status has no Uid")
	return 0
}

// A jailed VM can be merged, too.
func TestJailedMerge(t *testing.T) {
	l := newJailedLab(t, firecracker.Options{})
	m := l.memory(t, pageserver.PolicyCopy, buildHandler(t))
	m.Merge = true
	v, _ := l.restore(t, m)
	isJailed(t, v)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/ksm_stat", v.Handle().PID))
	if err != nil || !strings.Contains(string(b), "ksm_merge_any:") {
		t.Skipf("this kernel does not tell of merging (before Linux 6.15): %v", err)
	}
	if !strings.Contains(string(b), "ksm_merge_any: yes") {
		t.Errorf("not mergeable: %s", b)
	}
}

// What a VM inherits, its leases, outlives the jailer, and ends with the VM.
func TestJailedKeepsLeases(t *testing.T) {
	l := newJailedLab(t, firecracker.Options{})
	lease, err := os.Create(filepath.Join(l.dir, "lease"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lease.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	c := l.config(t, l.memory(t, "", ""))
	c.Inherit = []*os.File{lease}
	v, err := l.engine.Restore(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	lease.Close()
	other, err := os.OpenFile(filepath.Join(l.dir, "lease"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the lease is not held: %v", err)
	}
	end(t, v)
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lease is still held: %v", err)
	}
}

// The state of a jailed VM is what it wrote, and it cannot have another file be taken
// for it.
func TestJailedSaveState(t *testing.T) {
	l := newJailedLab(t, firecracker.Options{})
	v, c := l.restore(t, l.memory(t, "", ""))
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(l.dir, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	// As a hostile VM would.
	if err := os.Symlink(secret, filepath.Join(v.Handle().Root, "save.state")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.Dir, "state")
	if err := v.SaveState(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "state" {
		t.Errorf("state %q, error %v", b, err)
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
		t.Errorf("the other file has %q, error %v", b, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("the state is the VM's: %v", err)
	}
	// It is adopted as any other.
	again, err := l.engine.Adopt(t.Context(), v.Handle())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	end(t, again)
}

// A jailer that fails is quoted, and leaves nothing.
func TestJailerFails(t *testing.T) {
	l := newJailedLab(t, firecracker.Options{})
	if err := os.WriteFile(filepath.Join(l.dir, "bin", "jailer"), []byte("#!/bin/sh\necho Failed to unshare >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, policy := range []pageserver.Policy{"", pageserver.PolicyShare} {
		c := l.config(t, l.memory(t, policy, buildHandler(t)))
		if _, err := l.engine.Restore(t.Context(), c); err == nil || !strings.Contains(err.Error(), "Failed to unshare") {
			t.Errorf("Restore = %v", err)
		}
		if left, err := os.ReadDir(c.Dir); err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool { return e.IsDir() }) {
			t.Errorf("left %v, error %v", left, err)
		}
	}
	if err := os.Remove(filepath.Join(l.dir, "bin", "jailer")); err != nil {
		t.Fatal(err)
	}
	_, err := l.engine.Restore(t.Context(), l.config(t, l.memory(t, "", "")))
	if !errors.Is(err, jail.ErrUnusable) || !strings.Contains(err.Error(), "fcvm setup --engine firecracker") {
		t.Errorf("without a jailer: %v", err)
	}
}

// The real jailer makes a real Firecracker what the fake one makes the fake. No guest is
// started, so it needs no KVM, and no cgroups.
func TestRealJailer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can jail")
	}
	e := firecracker.NewFakeJailed(firecracker.Options{}, &jail.Host{Claims: filepath.Join(t.TempDir(), "users")})
	p, err := e.Find(t.Context())
	if err != nil || p.Jailer == "" {
		t.Skipf("no Firecracker with its jailer: %v", err)
	}
	l := newFakeLab(t, "", firecracker.Options{})
	l.jailed = true
	lease, err := os.Create(filepath.Join(l.dir, "lease"))
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	c := l.config(t, l.memory(t, "", ""))
	c.Inherit = []*os.File{lease}
	if err := tapnet.Usable(); err == nil {
		c.Network = vmm.NetworkTAP // which a jailed Firecracker must be able to open
	}
	v, err := e.StartJailed(t.Context(), c.Place, c.Machine)
	if err != nil {
		t.Fatal(err)
	}
	isJailed(t, v)
	want, err := lease.Stat()
	if err != nil {
		t.Fatal(err)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", v.Handle().PID))
	if err != nil || !slices.ContainsFunc(fds, func(fd string) bool {
		have, err := os.Stat(fd)
		return err == nil && os.SameFile(have, want)
	}) {
		t.Errorf("it has not inherited the lease: %q, %v", fds, err)
	}
	for _, name := range []string{"dev/kvm", "rootfs", "container.log", "api.sock"} {
		if _, err := os.Lstat(filepath.Join(v.Handle().Root, name)); err != nil {
			t.Error(err)
		}
	}
	end(t, v)
	if err := jail.Remove(c.Dir); err != nil {
		t.Error(err)
	}
}
