package process

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// envClose makes the test binary close all but its standard descriptors, as it thinks.
const envClose = "FCVM_TEST_CLOSE_RANGE"

func init() {
	if os.Getenv(envClose) == "" {
		return
	}
	if err := unix.CloseRange(3, 100, 0); err != nil {
		os.Exit(2)
	}
	if _, err := unix.FcntlInt(3, unix.F_GETFD, 0); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func TestStartWithout(t *testing.T) {
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	command := func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), envClose+"=1")
		cmd.ExtraFiles = []*os.File{file}
		return cmd
	}
	if err := command().Run(); err == nil {
		t.Fatal("close_range closed nothing, without any filter")
	}
	cmd := command()
	if err := StartWithout(cmd, unix.SYS_CLOSE_RANGE); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the inherited descriptor was closed, or the call failed: %v", err)
	}
	// The filter is not this process's.
	if err := unix.CloseRange(1000, 1001, 0); err != nil {
		t.Error(err)
	}
	if err := command().Run(); err == nil {
		t.Error("a later child has the filter, too")
	}
}
