// Package jail lays out the directory in which Firecracker's jailer locks up one VM,
// and takes it away again.
//
// A jail is below the VM's own directory, and what the VM needs of the host is linked
// into it: hard links, so that nothing has to be unmounted, and no page of the image or
// of a snapshot is twice in memory. The jailer (v1.16, src/jailer) then copies Firecracker
// into it, joins the cgroup, makes the devices, makes the directory its root in a mount
// namespace of its own, and becomes Firecracker, as a user that nobody else is. Two
// namespaces more, of process IDs and of the network, are made before: a jailer that is
// told to would stay the parent of what is really the VM.
//
// What is in a jail belongs to the VM, which may be hostile. So nothing in it is opened by
// the host through a name that may be a link: see [Dial].
package jail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrUnusable is wrapped when VMs cannot be jailed on this host.
var ErrUnusable = errors.New("no jail")

const (
	// dirName is the jailer's base directory, in the VM's.
	dirName = "jail"
	// rootName is what the jailer calls the new root.
	rootName = "root"
	// parentCgroup holds the cgroup of each jail.
	parentCgroup = "fcvm"
)

// Config describes a jail.
type Config struct {
	// Dir is the VM's directory, ID what it is called: letters, digits and "-".
	Dir, ID string
	// Firecracker and Jailer are the programs.
	Firecracker, Jailer string
	// Limits of the VM.
	Limits Limits
	// Host is where things are; nil means this host.
	Host *Host
}

// Limits are the cgroup's.
type Limits struct {
	// MemoryBytes of the guest, and its CPUs. The VMM gets something on top of both.
	MemoryBytes int64
	CPUs        int
}

// Above what the guest has. Firecracker itself holds some 5 MiB; page tables and
// sockets count, too.
const (
	memoryOverhead = 128 << 20
	extraThreads   = 16
	cpuPeriod      = 100_000 // microseconds, the kernel's default
)

// settings are the cgroup's files (Documentation/admin-guide/cgroup-v2.rst). One more
// processor than the guest's, for the threads that do its input and output.
func (l Limits) settings() []string {
	return []string{
		"memory.max=" + strconv.FormatInt(l.MemoryBytes+memoryOverhead, 10),
		fmt.Sprintf("cpu.max=%d %d", (l.CPUs+1)*cpuPeriod, cpuPeriod),
		"pids.max=" + strconv.Itoa(l.CPUs+extraThreads),
	}
}

// Host is what a jail needs of the machine. The zero value of a field means what
// [ThisHost] has.
type Host struct {
	// Claims is a directory, one for the whole machine, with a file for each user ID.
	Claims string
	// Cgroup is where cgroup v2 is mounted; empty means that there are no limits.
	Cgroup string
}

// claims is below root's runtime directory, whatever data directory is used: users are
// the machine's.
const claims = "/run/fcvm/jail-users"

// ThisHost says what there is here, or what is missing. The error wraps [ErrUnusable].
func ThisHost() (*Host, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: only root can make one; run fcvm as root, or without --jail", ErrUnusable)
	}
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	defer f.Close()
	cgroup, err := cgroupMount(f)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	return &Host{Claims: claims, Cgroup: cgroup}, nil
}

// cgroupMount finds the first cgroup v2 in /proc/self/mounts, as the jailer does, and
// checks that it limits what is to be limited.
func cgroupMount(mounts io.Reader) (string, error) {
	all, err := io.ReadAll(mounts)
	if err != nil {
		return "", fmt.Errorf("read mounts: %w", err)
	}
	const mend = "boot with systemd.unified_cgroup_hierarchy=1, or `mount -t cgroup2 none /sys/fs/cgroup` where nothing is mounted there"
	for line := range strings.Lines(string(all)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "cgroup2" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(f[1], "cgroup.controllers"))
		if err != nil {
			return "", fmt.Errorf("read the cgroup's controllers: %w", err)
		}
		have := " " + strings.TrimSpace(string(b)) + " "
		for _, c := range []string{"memory", "cpu", "pids"} {
			if !strings.Contains(have, " "+c+" ") {
				return "", fmt.Errorf("the cgroup v2 at %s cannot limit %q: %s", f[1], c, mend)
			}
		}
		return f[1], nil
	}
	return "", errors.New("there is no cgroup v2: " + mend)
}

// Jail is one VM's, from before its start.
type Jail struct {
	c    Config
	root string
	uid  int
	// claim keeps the user ID for as long as somebody holds it open.
	claim *os.File
}

// validID is what the jailer accepts.
var validID = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

// New makes the directory of a jail, and claims a user for it. Until the VM runs, the
// caller closes it, and removes it with [Remove] when it does not come to that.
func New(c Config) (*Jail, error) {
	if c.Host == nil {
		h, err := ThisHost()
		if err != nil {
			return nil, err
		}
		c.Host = h
	}
	if c.Jailer == "" {
		return nil, fmt.Errorf("%w: there is no jailer beside %s; `fcvm setup --engine firecracker` installs both", ErrUnusable, c.Firecracker)
	}
	if !validID.MatchString(c.ID) {
		return nil, fmt.Errorf("make jail: the VM's ID %q is not letters, digits and -", c.ID)
	}
	// The jailer names the directory by the program, links followed.
	program, err := filepath.EvalSymlinks(c.Firecracker)
	if err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	base, err := filepath.Abs(filepath.Join(c.Dir, dirName))
	if err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	c.Firecracker = program
	j := &Jail{c: c, root: filepath.Join(base, filepath.Base(program), c.ID, rootName)}
	// An earlier start in the same place may have left one.
	if err := Remove(c.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(j.root, 0o700); err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	if j.uid, j.claim, err = claimUser(c.Host.Claims); err != nil {
		return nil, errors.Join(err, Remove(c.Dir))
	}
	return j, nil
}

// Users of jails. No distribution, and nothing of systemd's, uses IDs in this range
// (systemd's docs/UIDS-GIDS.md: 1879048192 to 2147483647 are unused).
const (
	firstUser = 1_900_000_000
	users     = 1 << 16
)

// claimUser finds a user ID that no other jail on this machine has: one whose file
// nobody has locked. The VMM inherits the open file, so the kernel gives the user back
// when the VM ends.
func claimUser(dir string) (int, *os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, nil, fmt.Errorf("claim a user for the jail: %w", err)
	}
	for uid := firstUser; uid < firstUser+users; uid++ {
		f, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(uid)), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return 0, nil, fmt.Errorf("claim a user for the jail: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return uid, f, nil
		}
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return 0, nil, fmt.Errorf("claim a user for the jail: lock %s: %w", f.Name(), err)
		}
	}
	return 0, nil, fmt.Errorf("claim a user for the jail: all %d are in use", users)
}

// Root is the directory that the VM takes for "/".
func (j *Jail) Root() string { return j.root }

// User is the user ID of the VM, and its group's.
func (j *Jail) User() int { return j.uid }

// Claim is what the VMM must inherit.
func (j *Jail) Claim() *os.File { return j.claim }

// Close closes what the VMM has inherited by now. It is idempotent.
func (j *Jail) Close() {
	if j.claim != nil {
		j.claim.Close()
		j.claim = nil
	}
}

// Link gives the VM a file to read, under a name in its root. The file itself becomes
// readable for everybody who gets at it, which are those in whose jail it is: the
// directories of fcvm are root's alone.
func (j *Jail) Link(f *os.File, name string) error {
	err := linkFile(f, filepath.Join(j.root, name))
	if errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("link %s into the jail: it is on another file system than %s; a jail needs all of fcvm's data directory on one", f.Name(), j.root)
	}
	if err != nil {
		return fmt.Errorf("link %s into the jail: %w", f.Name(), err)
	}
	return readable(f)
}

// linkFile makes a link of what is open, whatever has become of its name.
func linkFile(f *os.File, path string) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var linkErr error
	err = raw.Control(func(fd uintptr) {
		linkErr = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(fd)), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	})
	return errors.Join(err, linkErr)
}

// LinkOrCopy is Link, for a small file that may lie anywhere.
func (j *Jail) LinkOrCopy(path, name string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("link into the jail: %w", err)
	}
	defer f.Close()
	err = linkFile(f, filepath.Join(j.root, name))
	if err == nil {
		return readable(f)
	}
	if !errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("link %s into the jail: %w", path, err)
	}
	c, err := os.OpenFile(filepath.Join(j.root, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("copy into the jail: %w", err)
	}
	_, err = io.Copy(c, f)
	if err = errors.Join(err, c.Close()); err != nil {
		return fmt.Errorf("copy %s into the jail: %w", path, err)
	}
	return nil
}

func readable(f *os.File) error {
	fi, err := f.Stat()
	if err == nil && fi.Mode().Perm()&0o004 == 0 {
		err = f.Chmod(fi.Mode().Perm() | 0o004)
	}
	if err != nil {
		return fmt.Errorf("link %s into the jail: %w", f.Name(), err)
	}
	return nil
}

// Give makes a file of the VM's directory the VM's own, to be written by it as well as
// by the host. It is made where it is missing.
func (j *Jail) Give(path, name string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("give %s to the jail: %w", name, err)
	}
	defer f.Close()
	if err := errors.Join(f.Chown(j.uid, j.uid), linkFile(f, filepath.Join(j.root, name))); err != nil {
		return fmt.Errorf("give %s to the jail: %w", name, err)
	}
	return nil
}

// Make makes a file in the jail that the VM may read, as large as this, all hole.
func (j *Jail) Make(name string, size int64) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(j.root, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	if err == nil {
		err = errors.Join(f.Chmod(0o444), f.Truncate(size))
	}
	if err != nil {
		return nil, fmt.Errorf("make %s in the jail: %w", name, err)
	}
	return f, nil
}

// NewFile makes a file in a jail that runs, which the VM may write. An earlier one of
// that name is removed.
func NewFile(root, name string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Lstat(root, &st); err != nil {
		return nil, fmt.Errorf("make %s in the jail: %w", name, err)
	}
	path := filepath.Join(root, name)
	_ = os.Remove(path)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = f.Chown(int(st.Uid), int(st.Gid))
	}
	if err != nil {
		return nil, fmt.Errorf("make %s in the jail: %w", name, err)
	}
	return f, nil
}

// Listen makes a socket in the jail that the VM may connect to.
func (j *Jail) Listen(name string) (*net.UnixListener, error) {
	dir, err := os.Open(j.root)
	if err != nil {
		return nil, fmt.Errorf("listen in the jail: %w", err)
	}
	defer dir.Close()
	// The path may be longer than a socket's address.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(fdPath(dir), name)})
	if err != nil {
		return nil, fmt.Errorf("listen in the jail: %w", err)
	}
	l.SetUnlinkOnClose(false) // by a path that will be another's; it goes with the jail
	if err := os.Lchown(filepath.Join(j.root, name), j.uid, j.uid); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen in the jail: %w", err)
	}
	return l, nil
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// Command is the jailer's, with arguments for Firecracker. It does not use its
// descriptors beyond standard error, and is to be kept from closing them: what the VMM
// inherits are locks that live as long as it does.
//
// The namespaces of process IDs and of the network are new, and the latter is empty.
func (j *Jail) Command(args ...string) *exec.Cmd {
	all := []string{
		"--id", j.c.ID, "--exec-file", j.c.Firecracker, "--uid", strconv.Itoa(j.uid), "--gid", strconv.Itoa(j.uid),
		"--chroot-base-dir", filepath.Join(j.c.Dir, dirName),
	}
	if j.c.Host.Cgroup != "" {
		all = append(all, "--cgroup-version", "2", "--parent-cgroup", parentCgroup)
		for _, s := range j.c.Limits.settings() {
			all = append(all, "--cgroup", s)
		}
	}
	cmd := exec.Command(j.c.Jailer, append(append(all, "--"), args...)...)
	cmd.Dir = "/"
	cmd.Env = []string{"LC_ALL=C"} // the jailer clears it
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNET}
	return cmd
}

// Dial connects to a socket in a jail's root, and to nothing else: the VM may have put
// a link in its place.
func Dial(ctx context.Context, root, name string) (net.Conn, error) {
	fd, err := unix.Open(filepath.Join(root, name), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("connect to %s in the jail: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("connect to %s in the jail: %w", name, err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("connect to %s in the jail: the VM has put something else there (%v)", name, fi.Mode().Type())
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", fdPath(f))
}

// Roots are the roots of the jails in a VM's directory: one, or none.
func Roots(dir string) []string {
	roots, _ := filepath.Glob(filepath.Join(globQuote(dir), dirName, "*", "*", rootName)) // the pattern is well-formed
	return roots
}

var globMeta = regexp.MustCompile(`[][*?\\]`)

func globQuote(s string) string { return globMeta.ReplaceAllString(s, `\$0`) }

// Remove removes the jail of a VM that has ended, and its cgroup. Where there is none it
// does nothing.
func Remove(dir string) error {
	base := filepath.Join(dir, dirName)
	if _, err := os.Lstat(base); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs []error
	if mount, err := mountOfCgroups(); err == nil {
		for _, root := range Roots(dir) {
			errs = append(errs, removeCgroup(mount, filepath.Base(filepath.Dir(root))))
		}
	}
	errs = append(errs, os.RemoveAll(base))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove jail: %w", err)
	}
	return nil
}

func mountOfCgroups() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	defer f.Close()
	return cgroupMount(f)
}

// removeCgroup also removes the parent with the last one.
func removeCgroup(mount, id string) error {
	parent := filepath.Join(mount, parentCgroup)
	if err := unix.Rmdir(filepath.Join(parent, id)); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", filepath.Join(parent, id), err)
	}
	if err := unix.Rmdir(parent); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove cgroup %s: %w", parent, err)
	}
	return nil
}
