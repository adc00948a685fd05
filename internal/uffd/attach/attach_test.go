//go:build linux && amd64

package attach_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/uffd/uffdtest"
)

const (
	page = uffdtest.PageSize
	// No multiple of what the Go runtime maps for its heap.
	size = 37 * page
	// envChild makes the test binary a VMM that is attached to.
	envChild = "FCVM_TEST_ATTACH"
)

// The main thread is the one that is traced; a VMM maps its memory there.
func init() {
	if os.Getenv(envChild) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if mode := os.Getenv(envChild); mode != "" {
		child(mode)
		return
	}
	os.Exit(uffdtest.Main(m))
}

// child maps memory as QEMU does and then obeys standard input: "r PAGE" reads
// a byte of a page and prints it, "w PAGE" writes 0x77 to it, "d PAGE" gives it
// back.
func child(mode string) {
	switch mode {
	case "exit":
		os.Exit(3)
	case "hang":
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	case "own jailed":
		// As a jailer does with what it inherited, before it becomes the VMM.
		if err := unix.CloseRange(4, 5, 0); err != nil {
			fmt.Println("close_range:", err)
			return
		}
		ownChild(false)
		return
	case "own", "own too much":
		ownChild(mode == "own too much")
		return
	case "signals":
		// Ignored signals would not stop the process.
		c := make(chan os.Signal, 4096)
		signal.Notify(c, unix.SIGUSR1)
		for range 200 {
			_ = unix.Kill(os.Getpid(), unix.SIGUSR1)
		}
		defer func() { fmt.Println("signal", <-c) }()
	}
	reserve, err := mmap(0, size+1<<20, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		fmt.Println("reserve:", err)
		return
	}
	// Alike in size only: these stay anonymous memory.
	for _, c := range [][2]int{
		{unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS},
		{unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE},
		{unix.PROT_NONE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS},
		{unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_ANONYMOUS},
	} {
		if _, err := mmap(0, size, c[0], c[1]); err != nil {
			fmt.Println("other mmap:", err)
			return
		}
	}
	base, err := mmap(reserve, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
	if err != nil || base != reserve {
		fmt.Printf("mmap at %#x: %#x, %v\n", reserve, base, err)
		return
	}
	fmt.Printf("base %#x\n", base)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		op, arg, _ := strings.Cut(in.Text(), " ")
		n, _ := strconv.Atoi(arg)
		fmt.Println(memory(op, base+uintptr(n)*page))
	}
}

func memory(op string, at uintptr) string {
	cell := uffdtest.At(at, page)
	switch op {
	case "r":
		return strconv.Itoa(int(cell[0]))
	case "w":
		cell[0] = 0x77
		return strconv.Itoa(int(cell[1]))
	case "d":
		return fmt.Sprint(unix.Madvise(cell, unix.MADV_DONTNEED))
	}
	return "?"
}

func mmap(at, n uintptr, prot, flags int) (uintptr, error) {
	return mmapFile(at, n, prot, flags, -1, 0)
}

func mmapFile(at, n uintptr, prot, flags, fd int, offset uintptr) (uintptr, error) {
	p, _, errno := unix.Syscall6(unix.SYS_MMAP, at, n, uintptr(prot), uintptr(flags), uintptr(uint32(fd)), offset)
	if errno != 0 {
		return 0, errno
	}
	return p, nil
}

// template is a memfd of which page i holds byte i+1, but odd ones are holes.
func template(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("template", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "template")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < size/page; i += 2 {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, page), int64(i)*page); err != nil {
			t.Fatal(err)
		}
	}
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ro.Close() })
	return ro
}

type vmm struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	// stdout is the VMM's end, closed here once it has it.
	stdout io.Closer
	out    *bufio.Scanner
}

func command(t *testing.T, mode string) *vmm {
	t.Helper()
	if err := attach.Probe(); err != nil {
		t.Skipf("needs ptrace: %v", err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envChild+"="+mode)
	cmd.Stderr = os.Stderr
	// Not by StdinPipe, which leaks its pipe when the command is never started.
	pipe := func() (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(); w.Close() })
		return r, w
	}
	stdin, in := pipe()
	out, stdout := pipe()
	cmd.Stdin, cmd.Stdout = stdin, stdout
	return &vmm{cmd, in, stdout, bufio.NewScanner(out)}
}

// start attaches and reads where the memory is.
func (v *vmm) start(t *testing.T, c attach.Config) *attach.Attached {
	t.Helper()
	a, err := attach.Start(t.Context(), v.cmd, c)
	if err != nil {
		t.Fatal(err)
	}
	v.stdout.Close()
	t.Cleanup(func() {
		v.in.Close()
		_ = v.cmd.Process.Kill()
		_ = v.cmd.Wait()
		if a.UFFD != nil {
			a.UFFD.Close()
		}
	})
	if got, want := v.line(t), fmt.Sprintf("base %#x", a.Addr); got != want {
		t.Fatalf("VMM says %q, want %q", got, want)
	}
	return a
}

func (v *vmm) send(t *testing.T, s string) {
	t.Helper()
	if _, err := fmt.Fprintln(v.in, s); err != nil {
		t.Fatal(err)
	}
}

func (v *vmm) line(t *testing.T) string {
	t.Helper()
	if !v.out.Scan() {
		t.Fatal("VMM ended:", v.out.Err())
	}
	return v.out.Text()
}

func (v *vmm) ask(t *testing.T, s string) string {
	t.Helper()
	v.send(t, s)
	return v.line(t)
}

func TestFileMapping(t *testing.T) {
	for _, mode := range []string{"plain", "signals"} {
		t.Run(mode, func(t *testing.T) {
			v := command(t, mode)
			a := v.start(t, attach.Config{Size: size, File: template(t)})
			if a.UFFD != nil {
				t.Error("a userfaultfd that nobody asked for")
			}
			for _, c := range [][2]string{{"r 0", "1"}, {"r 4", "5"}, {"w 4", "5"}, {"r 4", "119"}} {
				if got := v.ask(t, c[0]); got != c[1] {
					t.Errorf("%s: got %s, want %s", c[0], got, c[1])
				}
			}
		})
	}
}

// A REMOVE, faults of both kinds, and pages of the file that cause none.
func TestUserfault(t *testing.T) {
	uffdtest.Require(t)
	v := command(t, "plain")
	a := v.start(t, attach.Config{Size: size, File: template(t), Userfault: true})
	if got := v.ask(t, "r 2"); got != "3" {
		t.Fatalf("page of the file: read %s", got)
	}
	v.send(t, "r 1")
	ev := uffdtest.Next(t, a.UFFD, 1)[0]
	if ev.Type != uffd.EventPageFault || ev.Write || ev.Address != a.Addr+page {
		t.Fatalf("got %+v", ev)
	}
	if _, err := a.UFFD.Copy(ev.Address, bytes.Repeat([]byte{50}, page)); err != nil {
		t.Fatal(err)
	}
	if got := v.line(t); got != "50" {
		t.Fatalf("read %s, want 50", got)
	}
	v.send(t, "w 3")
	if ev = uffdtest.Next(t, a.UFFD, 1)[0]; !ev.Write || ev.Address != a.Addr+3*page {
		t.Fatalf("got %+v", ev)
	}
	if _, err := a.UFFD.ZeroPage(ev.Address, page); err != nil {
		t.Fatal(err)
	}
	if got := v.line(t); got != "0" {
		t.Fatalf("read %s, want 0", got)
	}
	v.send(t, "d 1")
	if ev = uffdtest.Next(t, a.UFFD, 1)[0]; ev.Type != uffd.EventRemove || ev.Address != a.Addr+page || ev.End != a.Addr+2*page {
		t.Fatalf("got %+v", ev)
	}
	if got := v.line(t); got != "<nil>" {
		t.Fatalf("madvise: %s", got)
	}
}

// The VMM keeps its own descriptors in order, and none of those that attach
// needed, but for the userfaultfd.
func TestDescriptors(t *testing.T) {
	uffdtest.Require(t)
	v := command(t, "plain")
	mine, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	v.cmd.ExtraFiles = []*os.File{mine}
	v.start(t, attach.Config{Size: size, File: template(t), Userfault: true})
	if n := len(v.cmd.ExtraFiles); n != 1 {
		t.Errorf("the command has %d extra files now", n)
	}
	dir := fmt.Sprintf("/proc/%d/fd/", v.cmd.Process.Pid)
	if name, err := os.Readlink(dir + "3"); err != nil || name != "/dev/zero" {
		t.Errorf("descriptor 3 is %s, %v", name, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var faults int
	for _, e := range entries {
		name, _ := os.Readlink(dir + e.Name())
		switch {
		case strings.Contains(name, "[userfaultfd]"):
			faults++
		case strings.Contains(name, "template"), name == uffd.Device:
			t.Errorf("the VMM still has %s", name)
		}
	}
	if faults != 1 {
		t.Errorf("the VMM holds %d userfaultfds, want 1", faults)
	}
}

// gone checks that nothing is left of a command that failed to start.
func gone(t *testing.T, v *vmm) {
	t.Helper()
	if v.cmd.Process == nil {
		return
	}
	if err := unix.Kill(v.cmd.Process.Pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("process %d is still there: %v", v.cmd.Process.Pid, err)
	}
}

func TestEndsBeforeItMaps(t *testing.T) {
	v := command(t, "exit")
	_, err := attach.Start(t.Context(), v.cmd, attach.Config{Size: size, File: template(t)})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Fatalf("got %v", err)
	}
	gone(t, v)
}

func TestContextEnds(t *testing.T) {
	v := command(t, "hang")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		// It reads this once its runtime is up, long after the filter is in place.
		_, _ = io.WriteString(v.in, strings.Repeat("x", 1<<17))
		cancel()
	}()
	_, err := attach.Start(ctx, v.cmd, attach.Config{Size: size, File: template(t)})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	gone(t, v)

	v = command(t, "plain")
	if _, err := attach.Start(ctx, v.cmd, attach.Config{Size: size, File: template(t)}); !errors.Is(err, context.Canceled) || v.cmd.Process != nil {
		t.Fatalf("got %v", err)
	}
}

func TestBadInput(t *testing.T) {
	tmpl := template(t)
	disk, err := os.CreateTemp(t.TempDir(), "mem")
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if err := disk.Truncate(size); err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		name   string
		config attach.Config
		path   string
		want   string
	}{
		{"half a page", attach.Config{Size: 100, File: tmpl}, "", "not whole pages"},
		{"no such program", attach.Config{Size: size, File: tmpl}, "/nonexistent", "no such file"},
		{"file that cannot be mapped", attach.Config{Size: size, File: null}, "", "map /dev/null as its memory"},
		{"userfaultfd on a disk file", attach.Config{Size: size, File: disk, Userfault: true}, "", "register memory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.config.Userfault {
				uffdtest.Require(t)
				var st unix.Statfs_t
				if err := unix.Statfs(disk.Name(), &st); err == nil && st.Type == unix.TMPFS_MAGIC {
					t.Skip("needs a temporary directory that is not tmpfs")
				}
			}
			v := command(t, "plain")
			if c.path != "" {
				v.cmd.Path = c.path
			}
			_, err := attach.Start(t.Context(), v.cmd, c.config)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			gone(t, v)
		})
	}
}
