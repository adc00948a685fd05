package guestd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"fcvm/internal/guest/proto"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// command is a process to start.
type command struct {
	args     []string
	env      []string
	dir      string
	makeDir  bool
	user     string
	tty      bool
	stdin    bool // a pipe instead of /dev/null; a TTY has it anyway
	size     winsize
	etc      string
	hostname string
}

// winsize is a terminal's size; zero means 24 × 80.
type winsize struct{ rows, cols uint16 }

// process is a running one, with our ends of its streams.
type process struct {
	pid    int
	status <-chan syscall.WaitStatus
	// master is the TTY's; without TTY it is nil, and stdout and stderr are pipes.
	master         *os.File
	stdout, stderr *os.File

	stdinMu sync.Mutex
	stdin   *os.File // guarded by stdinMu; nil when closed or none

	mu    sync.Mutex
	ended bool // guarded by mu: the pid may belong to another by now
}

// start starts c. The error is a *proto.Error with the code that docker gives.
func start(children Children, c command) (*process, error) {
	who, err := lookUser(c.etc, c.user)
	if err != nil {
		return nil, failure(125, err)
	}
	env := environment(c, who.Home)
	dir, err := workDir(c, who)
	if err != nil {
		return nil, err
	}
	path, err := lookPath(c.args[0], getenv(env, "PATH"), dir)
	if err != nil {
		return nil, err
	}
	p := &process{}
	attr := &syscall.ProcAttr{Dir: dir, Env: env, Sys: &syscall.SysProcAttr{Setsid: true}}
	if os.Geteuid() == 0 {
		// The primary group too: without it, files that are closed to this group would
		// open to the process (CVE-2022-36109).
		groups := []uint32{uint32(who.Gid)}
		for _, g := range who.Sgids {
			if g != who.Gid {
				groups = append(groups, uint32(g))
			}
		}
		attr.Sys.Credential = &syscall.Credential{Uid: uint32(who.Uid), Gid: uint32(who.Gid), Groups: groups}
	}
	theirs, err := p.openStreams(c, who, attr)
	if err == nil {
		p.pid, p.status, err = children.Start(func() (int, error) {
			return syscall.ForkExec(path, c.args, attr)
		})
		if err != nil {
			err = execError(c.args[0], err)
		}
	}
	for _, f := range theirs {
		f.Close()
	}
	if err != nil {
		p.closeStreams()
		return nil, err
	}
	return p, nil
}

// openStreams opens the process's streams: our ends into p, theirs into attr. It
// returns what to close when the process has them.
func (p *process) openStreams(c command, who *user.ExecUser, attr *syscall.ProcAttr) (theirs []*os.File, err error) {
	if c.tty {
		master, tty, err := openTTY(c.size)
		if err != nil {
			return nil, failure(125, err)
		}
		p.master, p.stdin = master, master
		if attr.Sys.Credential != nil {
			_ = tty.Chown(who.Uid, -1) // a courtesy to programs that open /dev/tty's file again
		}
		attr.Sys.Setctty = true // Ctty 0: the child's stdin
		fd := tty.Fd()
		attr.Files = []uintptr{fd, fd, fd}
		return []*os.File{tty}, nil
	}
	open := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
		}
		return r, w
	}
	var in, out, errw *os.File
	if c.stdin {
		in, p.stdin = open()
	} else {
		in, err = os.Open(os.DevNull)
	}
	p.stdout, out = open()
	p.stderr, errw = open()
	for _, f := range []*os.File{in, out, errw} {
		if f != nil {
			theirs = append(theirs, f)
		}
	}
	if err != nil {
		return theirs, failure(125, fmt.Errorf("open streams: %w", err))
	}
	if attr.Sys.Credential != nil {
		// /dev/stdout and /dev/stderr of a process that is not root lead here.
		for _, f := range theirs[len(theirs)-2:] {
			_ = f.Chown(who.Uid, who.Gid)
		}
	}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd()) // makes them blocking, as programs expect
	}
	return theirs, nil
}

func (p *process) closeStreams() {
	p.closeStdin()
	for _, f := range []*os.File{p.master, p.stdout, p.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// writeStdin blocks until the process has taken b. Without stdin, b is dropped.
func (p *process) writeStdin(b []byte) {
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	if p.stdin == nil {
		return
	}
	if _, err := p.stdin.Write(b); err != nil && p.master == nil {
		p.stdin.Close() // EPIPE: nobody will read it
		p.stdin = nil
	}
}

// closeStdin ends the process's stdin. On a TTY, where only a character can say
// so, it sends ^D.
func (p *process) closeStdin() {
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	if p.stdin == nil {
		return
	}
	if p.master != nil {
		_, _ = p.master.Write([]byte{4}) // the process may have ended
	} else {
		p.stdin.Close()
	}
	p.stdin = nil
}

func (p *process) resize(s winsize) {
	if p.master != nil && s.rows > 0 && s.cols > 0 {
		_ = setSize(p.master, s) // the process may have ended
	}
}

func (p *process) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.ended
}

// signal sends a signal, named "TERM", "SIGTERM" or "15".
func (p *process) signal(name string) error {
	sig, err := parseSignal(name)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return errors.New("the process has ended")
	}
	if err := unix.Kill(p.pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("send signal: %w", err)
	}
	return nil
}

func parseSignal(name string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(name); err == nil {
		if n > 0 && n <= 64 {
			return syscall.Signal(n), nil
		}
		return 0, fmt.Errorf("there is no signal %d", n)
	}
	upper := strings.ToUpper(name)
	if !strings.HasPrefix(upper, "SIG") {
		upper = "SIG" + upper
	}
	if sig := unix.SignalNum(upper); sig != 0 {
		return sig, nil
	}
	if rest, ok := strings.CutPrefix(upper, "SIGRTMIN"); ok { // systemd's stop signal is SIGRTMIN+3
		if n, err := strconv.Atoi("0" + strings.TrimPrefix(rest, "+")); err == nil && n <= 30 {
			return syscall.Signal(34 + n), nil
		}
	}
	return 0, fmt.Errorf("there is no signal %q", name)
}

// wait returns the exit code, 128+n after a signal n.
func (p *process) wait() int {
	ws := <-p.status
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

func lookUser(etc, spec string) (*user.ExecUser, error) {
	if spec == "" && os.Geteuid() != 0 {
		return &user.ExecUser{Uid: os.Geteuid(), Gid: os.Getegid(), Home: os.Getenv("HOME")}, nil
	}
	who, err := user.GetExecUserPath(spec, &user.ExecUser{Home: "/"}, filepath.Join(etc, "passwd"), filepath.Join(etc, "group"))
	if err != nil {
		return nil, fmt.Errorf("find user %q: %w", spec, err)
	}
	if os.Geteuid() != 0 && who.Uid != os.Geteuid() {
		return nil, fmt.Errorf("become user %q: the agent does not run as root", spec)
	}
	return who, nil
}

// environment adds what docker adds; of two values of one name the last counts.
func environment(c command, home string) []string {
	base := []string{"PATH=" + defaultPath, "HOSTNAME=" + c.hostname, "HOME=" + home}
	if c.tty {
		base = append(base, "TERM=xterm")
	}
	at := map[string]int{}
	var env []string
	for _, kv := range append(base, c.env...) {
		name, _, ok := strings.Cut(kv, "=")
		if !ok || name == "" || strings.ContainsRune(kv, 0) {
			continue
		}
		if i, ok := at[name]; ok {
			env[i] = kv
			continue
		}
		at[name] = len(env)
		env = append(env, kv)
	}
	return env
}

func getenv(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// workDir returns the directory to start in. For the container's process it is
// made, as docker does.
func workDir(c command, who *user.ExecUser) (string, error) {
	dir := c.dir
	if dir == "" {
		dir = "/"
	}
	if !filepath.IsAbs(dir) {
		return "", failure(125, fmt.Errorf("working directory %q is not absolute", dir))
	}
	fi, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) && c.makeDir {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", failure(126, fmt.Errorf("make working directory: %w", err))
		}
		_ = os.Chown(dir, who.Uid, who.Gid) // fails where we are not root, and then it is ours
		return dir, nil
	}
	if err != nil {
		return "", failure(126, fmt.Errorf("enter working directory: %w", err))
	}
	if !fi.IsDir() {
		return "", failure(126, fmt.Errorf("enter working directory: %s is not a directory", dir))
	}
	return dir, nil
}

// lookPath finds a program as execvp(3) does, in the process's own PATH.
func lookPath(name, path, dir string) (string, error) {
	if name == "" {
		return "", failure(127, errors.New("command is empty"))
	}
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		if err := executable(name); err != nil {
			return "", execError(name, err)
		}
		return name, nil
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		file := filepath.Join(d, name)
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			denied = execError(name, err)
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", failure(127, fmt.Errorf("exec %q: executable file not found in $PATH", name))
}

func executable(file string) error {
	fi, err := os.Stat(file)
	if err != nil {
		return err
	}
	if fi.IsDir() {
		return syscall.EISDIR
	}
	if fi.Mode()&0o111 == 0 {
		return fs.ErrPermission
	}
	return nil
}

// execError gives the code that a shell and docker give.
func execError(name string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	code := 126
	if errors.Is(err, fs.ErrNotExist) {
		code = 127
	}
	return failure(code, fmt.Errorf("exec %q: %w", name, err))
}

// frame does what a client's frame says.
func (p *process) frame(f proto.Frame, stdin bool) {
	switch f.Type {
	case proto.FrameStdin:
		if stdin {
			p.writeStdin(f.Payload)
		}
	case proto.FrameStdinEOF:
		if stdin {
			p.closeStdin()
		}
	case proto.FrameResize:
		if rows, cols, err := f.Size(); err == nil {
			p.resize(winsize{rows, cols})
		}
	case proto.FrameSignal:
		_ = p.signal(string(f.Payload)) // there is no frame to answer with
	}
}
