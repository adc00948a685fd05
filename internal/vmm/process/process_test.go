package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestChildIsReapedWhenKilled(t *testing.T) {
	p, err := Started(sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
		t.Fatal("done before its end")
	default:
	}
	for range 2 {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := StartTime(p.PID()); !errors.Is(err, ErrGone) {
		t.Errorf("start time of a reaped child: %v, want ErrGone", err)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("kill after the end: %v", err)
	}
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
}

// A process that dies closes its sockets before it is seen to have ended.
func TestExplainsWaitsForTheEndAfterTheSocket(t *testing.T) {
	p, err := Started(sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Release() }()
	refused := fmt.Errorf("connect: %w", os.NewSyscallError("connect", syscall.ECONNREFUSED))
	if p.Explains(errors.New("busy")) {
		t.Error("an error that a process gives explained by its end, and it lives")
	}
	if p.Explains(refused) {
		t.Error("a socket that was refused explained by the end of a process that lives")
	}
	killed := make(chan error, 1)
	time.AfterFunc(50*time.Millisecond, func() { killed <- p.Kill() })
	if !p.Explains(refused) {
		t.Error("the end that comes after that of the socket was not waited for")
	}
	if err := <-killed; err != nil {
		t.Fatal(err)
	}
	if !p.Explains(errors.New("busy")) {
		t.Error("the end of the process does not explain what came after it")
	}
}

func TestAdoptRefusesARecycledPID(t *testing.T) {
	child, err := Started(sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = child.Release() }()
	if _, err := Adopt(child.PID(), child.StartTime()+1); !errors.Is(err, ErrGone) {
		t.Errorf("adopt with another start time: %v, want ErrGone", err)
	}
	p, err := Adopt(child.PID(), child.StartTime())
	if err != nil {
		t.Fatal(err)
	}
	dup, err := p.Dup()
	if err != nil {
		t.Fatal(err)
	}
	defer dup.Close()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Wait(t.Context()), child.Wait(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := signal(dup, 0); !errors.Is(err, ErrGone) {
		t.Errorf("signal through the duplicate: %v, want ErrGone", err)
	}
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(child.PID(), child.StartTime()); !errors.Is(err, ErrGone) {
		t.Errorf("adopt after the end: %v, want ErrGone", err)
	}
}

// What its parent has not reaped yet has a pid and a start time, and has ended
// all the same.
func TestAdoptRefusesAZombie(t *testing.T) {
	cmd := sleeper(t)
	defer func() { _ = cmd.Wait() }() // "signal: killed"
	start, err := StartTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Adopt(cmd.Process.Pid, start)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Release() }()
	if err := errors.Join(p.Kill(), p.Wait(t.Context())); err != nil {
		t.Fatal(err)
	}
	if again, err := StartTime(cmd.Process.Pid); err != nil || again != start {
		t.Fatalf("the zombie's start time is %d, %v, want %d", again, err, start)
	}
	if _, err := Adopt(cmd.Process.Pid, start); !errors.Is(err, ErrGone) {
		t.Errorf("adopt a zombie: %v, want ErrGone", err)
	}
}

func TestReleaseLeavesTheProcessAlone(t *testing.T) {
	child, err := Started(sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Adopt(child.PID(), child.StartTime())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Release(); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-p.Done():
		t.Error("released process counts as ended")
	case <-child.Done():
		t.Error("release ended the process")
	default:
	}
	if err := p.Kill(); err == nil {
		t.Error("kill through a released process succeeded")
	}
	if err := errors.Join(child.Kill(), child.Wait(t.Context()), child.Release()); err != nil {
		t.Fatal(err)
	}
}

func TestParseStartTime(t *testing.T) {
	const rest = " S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 9 10"
	for _, name := range []string{"(sleep)", "(a b) c)", "() (x)"} {
		got, err := parseStartTime([]byte("42 " + name + rest))
		if err != nil || got != 123456 {
			t.Errorf("name %q: %d, %v, want 123456", name, got, err)
		}
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S 1 2", "1 (x) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 soon 9"} {
		if _, err := parseStartTime([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	if got, err := StartTime(os.Getpid()); err != nil || got == 0 {
		t.Errorf("own start time %d, %v", got, err)
	}
}
