package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// markVar is in the environment of everything that a script starts: fcvm, its
// supervisor, VMMs and page servers inherit it.
const markVar = "FCVM_E2E_MARK"

type process struct {
	pid     int
	cmdline string
}

func (p process) kill() { _ = syscall.Kill(p.pid, syscall.SIGKILL) }

// marked lists the live processes whose environment has this mark.
func marked(mark string) []process {
	want := []byte(markVar + "=" + mark + "\x00")
	var found []process
	envs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range envs {
		env, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(env, want) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		if len(cmdline) == 0 {
			continue // a zombie that its parent is about to reap
		}
		found = append(found, process{pid, strings.ReplaceAll(string(cmdline), "\x00", " ")})
	}
	return found
}

// stopSupervisor ends the script's supervisor as a service manager does, and
// waits until it is gone together with the page servers that it no longer needs.
func stopSupervisor(t testing.TB, mark string) {
	for _, p := range marked(mark) {
		if strings.Contains(p.cmdline, "fcvm serve") {
			_ = syscall.Kill(p.pid, syscall.SIGTERM)
		}
	}
	// A bound for what should take milliseconds: a page server whose last clone
	// is gone ends by itself.
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if len(marked(mark)) == 0 {
			return
		}
	}
	t.Logf("teardown: processes still run after 15 s")
}
