//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// envConfined makes the test binary confine itself, with a socket in the directory
// that it names, and try what it then must not, and what it must, be able to do.
const envConfined = "FCVM_TEST_CONFINED"

func tryConfined(dir string) int {
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	secret := filepath.Join(dir, "secret")
	if err := confine(options{socket: filepath.Join(dir, "s")}, slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
		fmt.Println(err)
		return 1
	}
	// On other threads, too.
	done := make(chan int)
	for range 4 {
		go func() {
			runtime.LockOSThread()
			bad := 0
			refused := func(what string, err error) {
				if !errors.Is(err, fs.ErrPermission) {
					fmt.Println(what, "is not refused:", err)
					bad++
				}
			}
			_, err := os.ReadFile(secret)
			refused("reading a file", err)
			_, err = os.Open("/proc/self/environ")
			refused("reading its environment", err)
			refused("making a file", os.WriteFile(filepath.Join(dir, "new"), nil, 0o600))
			refused("running a program", exec.Command("/bin/true").Run())
			_, err = net.Dial("tcp", "127.0.0.1:9")
			refused("connecting by TCP", err)
			_, err = unix.PtraceGetEventMsg(1)
			refused("tracing", err)
			works := func(what string, err error) {
				if err != nil {
					fmt.Println(what, "is refused:", err)
					bad++
				}
			}
			_, err = os.ReadFile("/proc/self/fdinfo/0")
			works("reading the numbers of a descriptor", err)
			_, err = unix.Poll([]unix.PollFd{{Fd: 0, Events: unix.POLLIN}}, 0)
			works("poll", err)
			works("nanosleep", unix.Nanosleep(&unix.Timespec{Nsec: 1}, nil))
			works("a signal to a thread", unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGURG))
			works("flags of a file", unix.SetNonblock(0, false))
			done <- bad
		}()
	}
	bad := 0
	for range 4 {
		bad += <-done
	}
	if err := l.Close(); err != nil {
		fmt.Println(err)
		bad++
	}
	if _, err := os.Lstat(filepath.Join(dir, "s")); err == nil {
		fmt.Println("the socket was left behind")
		bad++
	}
	return bad
}

func TestConfined(t *testing.T) {
	d := dir(t)
	if err := os.WriteFile(filepath.Join(d, "secret"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	test := filepath.Join(d, "test")
	cmd := exec.Command("go", "test", "-c", "-o", test, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // see confine
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd = exec.Command(test)
	cmd.Env = append(os.Environ(), envConfined+"="+d)
	out, err := cmd.CombinedOutput()
	if _, noLandlock := landlockABI(); noLandlock != nil {
		t.Skipf("%v; beside that: %s", noLandlock, out)
	}
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// What the program keeps while it serves.
func TestStatusWhileServing(t *testing.T) {
	d := dir(t)
	cmd, _ := start(t, filepath.Join(d, "s"), memFile(t, d, 8192))
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", cmd.Process.Pid))
	if err != nil || len(tasks) < 2 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "Seccomp:\t2"} {
			if !strings.Contains(string(status), want) {
				t.Errorf("%s lacks %q", task, want)
			}
		}
	}
}
