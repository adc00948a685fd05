package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// userID is of a user who is nobody in particular.
const userID = 64321

// userDir sets U to a directory of that user, with the binaries and a guest, for
// scripts whose own directories only root may enter.
func (l *lab) userDir(ts *testscript.TestScript, neg bool, args []string) {
	dir, err := os.MkdirTemp("", "fu")
	ts.Check(err)
	ts.Defer(func() { _ = os.RemoveAll(dir) })
	for to, from := range map[string]string{"bin": l.bin, "data/guest": l.guest} {
		ts.Check(os.MkdirAll(filepath.Dir(filepath.Join(dir, to)), 0o700))
		ts.Check(os.CopyFS(filepath.Join(dir, to), os.DirFS(from)))
	}
	// CopyFS loses the modes of nothing but set-id bits; owners are root's.
	ts.Check(filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, userID, userID)
	}))
	ts.Check(os.Mkdir(filepath.Join(dir, "run"), 0o700))
	ts.Check(os.Chown(filepath.Join(dir, "run"), userID, userID))
	ts.Setenv("U", dir)
}

// asUser [-uffd] ARG… runs $U/bin/fcvm as that user. With -uffd the user may open
// /dev/userfaultfd, by a device node of its own in a mount namespace of its own,
// so that the host's keeps its mode.
func asUser() {
	args := os.Args[1:]
	grant := len(args) > 0 && args[0] == "-uffd"
	if grant {
		args = args[1:]
	}
	u := os.Getenv("U")
	runtime.LockOSThread()
	if grant {
		if err := grantUserfault(filepath.Join(u, "userfaultfd")); err != nil {
			fail("asuser: %v", err)
		}
	}
	cmd := exec.Command(filepath.Join(u, "bin", "fcvm"), args...)
	cmd.Env = append(os.Environ(), "FCVM_DATA_DIR="+u+"/data", "XDG_RUNTIME_DIR="+u+"/run", "HOME="+u, "TMPDIR="+u+"/run")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Dir = u
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: userID}}
	if err := cmd.Run(); err != nil {
		if code := cmd.ProcessState.ExitCode(); code > 0 {
			os.Exit(code)
		}
		fail("asuser: %v", err)
	}
}

// grantUserfault puts a node that the user owns over /dev/userfaultfd, for this
// thread and what it starts.
func grantUserfault(node string) error {
	var st unix.Stat_t
	if err := unix.Stat("/dev/userfaultfd", &st); err != nil {
		return fmt.Errorf("/dev/userfaultfd: %w", err)
	}
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil && !os.IsExist(err) {
		return fmt.Errorf("mknod: %w", err)
	}
	if err := os.Chown(node, userID, userID); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount(node, "/dev/userfaultfd", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	return nil
}

// noTrace PROGRAM… runs a program for which, and for whose children, ptrace(2) is
// forbidden, as in many containers.
func noTrace() {
	path, err := exec.LookPath(os.Args[1])
	if err != nil {
		fail("notrace: %v", err)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_PTRACE, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// The filter is this thread's, and exec ends all others.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		fail("notrace: %v", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		fail("notrace: seccomp: %v", errno)
	}
	fail("notrace: %v", syscall.Exec(path, os.Args[1:], os.Environ()))
}

// pageServer kill: kill -9 of the script's one page server. pageServer is FILE: waits
// until that is its program.
func pageServer(ts *testscript.TestScript, neg bool, args []string) {
	find := func() (found []process) {
		for _, p := range marked(ts.Value(markKey{}).(string)) {
			if strings.HasPrefix(filepath.Base(p.exe()), "uffd_handler") { // of an old one it is "(deleted)"
				found = append(found, p)
			}
		}
		return found
	}
	switch {
	case len(args) == 1 && args[0] == "kill":
		found := find()
		if len(found) != 1 {
			ts.Fatalf("want one page server, found %v", found)
		}
		found[0].kill()
	case len(args) == 2 && args[0] == "is":
		want, err := os.Stat(ts.MkAbs(args[1]))
		ts.Check(err)
		for range 300 {
			if found := find(); len(found) == 1 {
				if got, err := os.Stat("/proc/" + strconv.Itoa(found[0].pid) + "/exe"); err == nil && os.SameFile(got, want) {
					return
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		ts.Fatalf("page servers: %v", find())
	default:
		ts.Fatalf("usage: pageserver kill, or pageserver is FILE")
	}
}

func (p process) exe() string {
	path, _ := os.Readlink("/proc/" + strconv.Itoa(p.pid) + "/exe")
	return path
}
