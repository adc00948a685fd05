package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"fcvm/internal/pageserver/pstest"
)

// markVar is in the environment of what a script starts: fcvm, its supervisor and
// page servers inherit it. VMMs get an environment of their own, and are known by
// the data directory on their command line.
const markVar = "FCVM_E2E_MARK"

// envPatience is by how much machines are slower than a usual one. It multiplies how
// long is waited for what comes in the end.
const envPatience = "FCVM_TEST_PATIENCE"

func patience(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv(envPatience)); err == nil {
		return d * time.Duration(max(n, 1))
	}
	return d
}

type process struct {
	pid     int
	cmdline string
}

func (p process) kill() { _ = syscall.Kill(p.pid, syscall.SIGKILL) }

// isVMM tells whether it is an engine's program, by the name that it was started by.
func (p process) isVMM() bool {
	program, _, _ := strings.Cut(p.cmdline, " ")
	program = filepath.Base(program)
	return strings.HasPrefix(program, "qemu-system") || strings.HasPrefix(program, "firecracker")
}

// marked lists the live processes whose environment has this mark, or whose command
// line names files in the data directory that the mark begins with.
func marked(mark string) []process {
	want := []byte(markVar + "=" + mark + "\x00")
	data, _, _ := strings.Cut(mark, ".")
	files := []byte("/" + data + "/")
	var found []process
	envs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range envs {
		env, err := os.ReadFile(path)
		if err != nil {
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
		if !bytes.Contains(env, want) && !bytes.Contains(cmdline, files) {
			continue
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
	for deadline := time.Now().Add(patience(15 * time.Second)); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if len(marked(mark)) == 0 {
			return
		}
	}
	t.Logf("teardown: processes still run after %v", patience(15*time.Second))
}

// hugePages makes huge pages free while the script runs.
func hugePages(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	release, err := pstest.ReserveHugePages(n)
	ts.Check(err)
	ts.Defer(release)
}

func vmms(ts *testscript.TestScript, neg bool, args []string) {
	var all, spares []process
	for _, p := range marked(ts.Value(markKey{}).(string)) {
		if !p.isVMM() {
			continue
		}
		all = append(all, p)
		id := regexp.MustCompile(`/vms/([0-9a-f]{12})/`).FindStringSubmatch(p.cmdline)
		// Nobody's VM has no record.
		if _, err := os.Stat(filepath.Join(ts.Getenv("FCVM_DATA_DIR"), "vms", id[1], "state.json")); os.IsNotExist(err) {
			spares = append(spares, p)
		}
	}
	if args[0] == "kill-spare" {
		if len(spares) == 0 {
			ts.Fatalf("no VMM waits for a clone: %v", all)
		}
		for _, p := range spares {
			p.kill()
		}
		return
	}
	if want, err := strconv.Atoi(args[0]); err != nil || want != len(all) {
		ts.Fatalf("%d VMMs run, want %s: %v", len(all), args[0], all)
	}
}
