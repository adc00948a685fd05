package snapshot

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
)

func TestRemoveRefusesLeased(t *testing.T) {
	s := open(t)
	create(t, s, "base", 1)
	lease, err := s.Lease("base")
	if err != nil {
		t.Fatal(err)
	}
	// The VM inherits the lease; the supervisor closes its copy, or dies.
	vm := exec.Command("sleep", "1000")
	vm.ExtraFiles = []*os.File{lease}
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	err = s.Remove("base")
	wantErr(t, err, ErrInUse, "base", "sleep (pid "+strconv.Itoa(vm.Process.Pid)+")")
	if _, err := s.Get("base"); err != nil {
		t.Error(err)
	}
	// The VM dies without a word.
	if err := vm.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = vm.Wait() // "signal: killed"
	if err := s.Remove("base"); err != nil {
		t.Error(err)
	}
	if got := left(t, s); got != "" {
		t.Errorf("left %q", got)
	}
	_, err = s.Lease("base")
	wantErr(t, err, ErrNotFound)
}

func TestLeasesAreShared(t *testing.T) {
	s := open(t)
	create(t, s, "base", 1)
	for range 3 {
		lease, err := s.Lease("base")
		if err != nil {
			t.Fatal(err)
		}
		defer lease.Close()
	}
	wantErr(t, s.Remove("base"), ErrInUse)
}

// TestLeaseOfRemoved opens the lease file before the removal and locks it after.
func TestLeaseOfRemoved(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1)
	path := snap.Dir + "/" + leaseFile
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Remove("base"); err != nil {
		t.Fatal(err)
	}
	create(t, s, "base", 2)
	if samePlace(f, path) {
		t.Error("the lease of a removed snapshot passes for that of its successor")
	}
}

// TestKilledCreation re-executes this test as a process that is killed while it
// makes a snapshot.
func TestKilledCreation(t *testing.T) {
	const env = "FCVM_TEST_SNAPSHOT_DIR"
	if dir := os.Getenv(env); dir != "" {
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Create(t.Context(), "base", func(ctx context.Context, d *Draft) (Manifest, error) {
			if _, err := fill(1, 2, 3)(ctx, d); err != nil {
				return Manifest{}, err
			}
			if _, err := os.Stdout.WriteString("half made\n"); err != nil {
				return Manifest{}, err
			}
			select {}
		})
		t.Fatal(err)
	}
	s := open(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command(self, "-test.run=^TestKilledCreation$")
	child.Env = append(os.Environ(), env+"="+s.dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "half made\n" {
		t.Errorf("child says %q, %v", line, err)
	}
	if _, err := s.Create(t.Context(), "base", fill()); !errors.Is(err, ErrExists) {
		t.Errorf("the name is claimed: %v", err)
	}
	if got := left(t, s); got != ".base.new" {
		t.Errorf("store holds %q", got)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // "signal: killed"

	names, err := s.Names()
	if err != nil || len(names) != 0 {
		t.Errorf("half a snapshot is listed: %q, %v", names, err)
	}
	if _, err := Open(s.dir); err != nil {
		t.Fatal(err)
	}
	if got := left(t, s); got != "" {
		t.Errorf("left %q after a sweep", got)
	}
}

// TestCreationAfterAKilledOne needs no sweep in between.
func TestCreationAfterAKilledOne(t *testing.T) {
	s := open(t)
	if err := os.MkdirAll(s.draftDir("base")+"/sub", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.draftDir("base")+"/"+memoryFile, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	create(t, s, "base", 1)
	if err := s.Verify(t.Context(), "base", nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.dir + "/base/sub"); err == nil {
		t.Error("the new snapshot has a file of the old")
	}
}

func TestKilledRemovalIsFinished(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1)
	if err := os.Rename(snap.Dir, s.dir+"/.base.1"+delSuffix); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.dir); err != nil {
		t.Fatal(err)
	}
	if got := left(t, s); got != "" {
		t.Errorf("left %q", got)
	}
}
