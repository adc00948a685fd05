// Command uffd_handler answers the page faults of microVMs that were started from
// one snapshot. VMMs connect to its socket and hand over their userfaultfd, as
// Firecracker does with the mem backend "Uffd".
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"fcvm/internal/buildinfo"
	"fcvm/internal/pageserver"
)

// memoryLimit is where the garbage collector starts to work harder. What the
// server needs lies far below: it keeps two bits a page, and a few goroutines a clone.
const memoryLimit = 32 << 20

func main() {
	o, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, errHelp):
		fmt.Print(usage)
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "uffd_handler: error: %v\nuffd_handler: hint: uffd_handler --help\n", err)
		os.Exit(2)
	case o.version:
		fmt.Println("uffd_handler", buildinfo.Get())
		return
	}
	debug.SetMemoryLimit(memoryLimit)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "uffd_handler: error: %v\n", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, or the server has no more to do.
func run(ctx context.Context, o options) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	c := pageserver.Config{
		MemFile: o.memFile, PageSums: o.pageSums, WorkingSet: o.workingSet, ID: o.id, Policy: o.policy, TemplateUsed: o.templateUsed,
		Fill: o.fill, AllowUIDs: o.allowUIDs, IdleTimeout: o.idleTimeout, Log: log,
	}
	template, err := openTemplate(o)
	if err != nil {
		return err
	}
	if template != nil {
		defer template.Close()
		c.Template = template
	}
	server, err := pageserver.New(c)
	if err != nil {
		return err
	}
	defer func() { _ = server.Close() }()

	var handshakes, control *net.UnixListener
	if o.socket != "-" {
		// Who else may connect is told by its credentials; others need not even try.
		mode := os.FileMode(0o600)
		if len(o.allowUIDs) > 0 {
			mode = 0o666
		}
		if handshakes, err = pageserver.Listen(ctx, o.socket, mode); err != nil {
			return err
		}
		defer handshakes.Close()
	}
	if o.control != "" {
		if control, err = openControl(ctx, o.control); err != nil {
			return err
		}
		defer control.Close()
	}
	relaxMonitor(log)
	if !o.noSandbox {
		if err := confine(o, log); err != nil {
			return err
		}
	}
	log.Info("page server begins", "socket", o.socket, "mem_file", o.memFile, "policy", o.policy, "template", name(template), "pid", os.Getpid())
	if o.readyFD >= 0 {
		ready := os.NewFile(uintptr(o.readyFD), "ready")
		_, err := ready.WriteString(pageserver.ReadyLine)
		if err = errors.Join(err, ready.Close()); err != nil {
			return fmt.Errorf("tell that the server is ready: %w", err)
		}
	}
	return server.Serve(ctx, handshakes, control)
}

// openControl listens on a path, or takes over a socket that listens.
func openControl(ctx context.Context, path string) (*net.UnixListener, error) {
	fd, ok := inherited(path)
	if !ok {
		return pageserver.Listen(ctx, path, 0o600)
	}
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("listen on %s: it is not a unix socket", path)
	}
	u.SetUnlinkOnClose(false) // it is its maker's
	return u, nil
}

// openTemplate opens what --template names, or makes a memfd for policy share.
func openTemplate(o options) (*os.File, error) {
	if fd, ok := inherited(o.template); ok {
		unix.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), o.template), nil
	}
	if o.template != "" {
		f, err := os.OpenFile(o.template, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open template: %w", err)
		}
		return f, nil
	}
	if o.policy != pageserver.PolicyShare {
		return nil, nil
	}
	if o.templateUsed {
		return nil, errors.New("--template-used needs --template")
	}
	fd, err := unix.MemfdCreate("fcvm-template", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)), nil
}

// inherited tells the number of a descriptor that a path names. Opening the path
// would make another description, and needs write permission on the file.
func inherited(path string) (int, bool) {
	for _, dir := range []string{"/proc/self/fd/", "/dev/fd/"} {
		if n, ok := strings.CutPrefix(path, dir); ok {
			fd, err := strconv.Atoi(n)
			return fd, err == nil && fd > 2
		}
	}
	return 0, false
}

func name(f *os.File) string {
	if f == nil {
		return ""
	}
	return f.Name()
}
