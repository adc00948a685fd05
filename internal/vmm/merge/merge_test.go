//go:build linux

package merge

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// requireMerge skips where the kernel has no such thing, whether KSM runs or not.
func requireMerge(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/bin/true")
	Command(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("not here: %s", bytes.TrimSpace(out))
	}
}

func TestCommandIsMergeable(t *testing.T) {
	requireMerge(t)
	cmd := exec.Command("/bin/cat", "/proc/self/ksm_stat")
	Command(cmd)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "ksm_merge_any:") {
		t.Skip("this kernel does not tell (before Linux 6.15)")
	}
	if !strings.Contains(string(out), "ksm_merge_any: yes") {
		t.Errorf("the program's memory is not mergeable: %s", out)
	}
	own, err := unix.PrctlRetInt(unix.PR_GET_MEMORY_MERGE, 0, 0, 0, 0)
	if err != nil || own != 0 {
		t.Errorf("this process: %d, %v; want it not to be mergeable", own, err)
	}
}

func TestCommandKeepsTheProgram(t *testing.T) {
	requireMerge(t)
	cmd := exec.Command("/bin/sh", "-c", `echo "$0 $1 $WORD"; cat; exit 3`, "a name", "an argument")
	cmd.Env = []string{"WORD=environment"}
	cmd.Stdin = strings.NewReader("input")
	Command(cmd)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || string(out) != "a name an argument environment\ninput" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestProgramThatIsNotThere(t *testing.T) {
	requireMerge(t)
	cmd := exec.Command("/no/such/program")
	cmd.Err = nil
	Command(cmd)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 125 || !strings.Contains(string(out), "start /no/such/program: no such file") {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestRuns(t *testing.T) {
	b, _ := os.ReadFile("/sys/kernel/mm/ksm/run")
	if err := Runs(); (err == nil) != (string(bytes.TrimSpace(b)) == "1") || err != nil && !errors.Is(err, ErrUnavailable) {
		t.Errorf("KSM's state is %q, but: %v", b, err)
	}
}
