package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"fcvm/internal/api"
)

// fail ends a program that a script runs.
func fail(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(1)
}

// run returns the standard output of a program, and fails when the program does.
func run(name string, args ...string) string {
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		fail("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

// logHas VM WORDS succeeds when the VM's log has the words.
func logHas() {
	out, err := exec.Command("fcvm", "logs", os.Args[1]).CombinedOutput()
	if err != nil || !strings.Contains(string(out), os.Args[2]) {
		fail("the log of %s has no %q:\n%s", os.Args[1], os.Args[2], out)
	}
}

// httpgetOnce fails when the URL does not answer now.
func httpgetOnce() {
	body, err := get(&http.Client{Timeout: patience(2 * time.Second)}, os.Args[1])
	if err != nil {
		fail("%v", err)
	}
	fmt.Print(body)
}

// identity VM… checks that clones are who they are: each its own name, machine
// id and random bytes, all the host's time.
func identity() {
	seen := map[string]string{}
	for _, vm := range os.Args[1:] {
		// The random bytes come first: what the clone's generator gives first.
		out := run("fcvm", "exec", vm, "sh", "-c",
			"head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; hostname; cat /etc/hostname; cat /etc/machine-id")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if len(lines) != 4 {
			fail("identity of %s: %q", vm, out)
		}
		if lines[1] != vm || lines[2] != vm {
			fail("%s calls itself %s and %s", vm, lines[1], lines[2])
		}
		for what, v := range map[string]string{"random bytes": lines[0], "machine id": lines[3]} {
			if want := map[string]int{"random bytes": 64, "machine id": 32}[what]; len(v) != want {
				fail("%s of %s: %q, want %d digits", what, vm, v, want)
			}
			if other, ok := seen[v]; ok {
				fail("%s and %s have the same %s", vm, other, what)
			}
			seen[v] = vm
		}
		fmt.Printf("%s: random bytes %s, machine id %s, clock off by %s\n", vm, lines[0], lines[3], checkClock(vm))
	}
}

// users VM… checks that each VM's process is of a user that is no other's.
func users() {
	seen := map[uint32]string{}
	for _, vm := range os.Args[1:] {
		var st syscall.Stat_t
		if err := syscall.Stat(fmt.Sprintf("/proc/%d", pidOf(vm)), &st); err != nil {
			fail("user of %s: %v", vm, err)
		}
		other, taken := seen[st.Uid]
		if taken || st.Uid < 1_900_000_000 || st.Gid != st.Uid {
			fail("%s runs as user %d and group %d, %q does, too", vm, st.Uid, st.Gid, other)
		}
		seen[st.Uid] = vm
	}
}

// killVMM VM kills a VM's process.
func killVMM() {
	if err := syscall.Kill(pidOf(os.Args[1]), syscall.SIGKILL); err != nil {
		fail("kill %s: %v", os.Args[1], err)
	}
}

// pidOf is the process of a VM.
func pidOf(vm string) int {
	var got api.VM
	if err := json.Unmarshal([]byte(run("fcvm", "inspect", vm)), &got); err != nil || got.PID <= 0 {
		fail("inspect %s: %v: %+v", vm, err, got)
	}
	return got.PID
}

// rightClock VM… checks that VMs have the host's time.
func rightClock() {
	for _, vm := range os.Args[1:] {
		fmt.Printf("%s: clock off by %s\n", vm, checkClock(vm))
	}
}

// maxClockOff is how far a VM's wall clock may be from the host's.
const maxClockOff = 100 * time.Millisecond

// checkClock tells by how much a VM's clock is off, and fails when that is too much.
func checkClock(vm string) string {
	low, high := clockOff(vm)
	off := fmt.Sprintf("%v to %v", low, high)
	if high < -maxClockOff || low > maxClockOff {
		fail("the clock of %s is off by %s, want at most %v", vm, off, maxClockOff)
	}
	return off
}

// clockOff asks a VM for the time, some times, and returns the bounds between which
// its clock differs from the host's: those of the quickest answer.
func clockOff(vm string) (low, high time.Duration) {
	run("fcvm", "cp", filepath.Join(os.Getenv("PROGRAMS"), "clock"), vm+":/root/clock")
	cmd := exec.Command("fcvm", "exec", "-i", vm, "/root/clock")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		fail("%v", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		fail("%v", err)
	}
	if err := cmd.Start(); err != nil {
		fail("%v", err)
	}
	answers := bufio.NewScanner(out)
	for i := range 20 {
		asked := time.Now()
		if _, err := io.WriteString(in, "\n"); err != nil || !answers.Scan() {
			fail("ask %s for the time: %v, %v", vm, err, answers.Err())
		}
		answered := time.Now()
		nanos, err := strconv.ParseInt(answers.Text(), 10, 64)
		if err != nil {
			fail("ask %s for the time: %v", vm, err)
		}
		said := time.Unix(0, nanos)
		if i == 0 || answered.Sub(asked) < high-low {
			low, high = said.Sub(answered), said.Sub(asked)
		}
	}
	if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
		fail("ask %s for the time: %v", vm, err)
	}
	return low, high
}

// memclones SNAPSHOT N clones a snapshot of memtest N times. All clones verify
// the whole pattern and rewrite a part of their own at once; then each must find
// its own writes and nobody else's.
func memclones() {
	snap := os.Args[1]
	n, _ := strconv.Atoi(os.Args[2])
	client := &http.Client{Timeout: patience(2 * time.Minute)}
	step := func(i, port int) error {
		base := fmt.Sprintf("http://127.0.0.1:%d", port)
		// Parts overlap between neighbours, so that a write that leaks is seen.
		part := fmt.Sprintf("seed=%d&from=%d&pages=%d", i+1, 1000*i+i, 1500)
		for _, url := range []string{base + "/verify", base + "/rewrite?" + part, base + "/verify?" + part} {
			if _, err := get(client, url); err != nil {
				return err
			}
		}
		return nil
	}
	ports := make([]int, n)
	for i := range ports {
		port, err := freePort()
		if err != nil {
			fail("%v", err)
		}
		ports[i] = port
		run("fcvm", "clone", "--snapshot", snap, "--name", fmt.Sprintf("m%d", i), "-p", fmt.Sprintf("127.0.0.1:%d:8080", port))
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i, port := range ports {
		wg.Go(func() { errs[i] = step(i, port) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			fail("clone m%d: %v", i, err)
		}
	}
	// Once more, now that everybody has written.
	for i, port := range ports {
		url := fmt.Sprintf("http://127.0.0.1:%d/verify?seed=%d&from=%d&pages=%d", port, i+1, 1000*i+i, 1500)
		if _, err := get(client, url); err != nil {
			fail("clone m%d: %v", i, err)
		}
		fmt.Printf("m%d verified twice\n", i)
	}
}

// restore SNAPSHOT puts the copy in ./saved back in its place.
func restore() {
	dir := filepath.Join(os.Getenv("FCVM_DATA_DIR"), "snapshots", os.Args[1])
	if err := os.RemoveAll(dir); err != nil {
		fail("%v", err)
	}
	run("cp", "-a", "saved", dir)
}
