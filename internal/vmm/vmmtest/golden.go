package vmmtest

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"testing"
	"time"
)

func (l *lab) testInfo(t *testing.T) {
	info, err := l.engine.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.Name == "" || info.Version == "" || info.Path == "" || info.CPU == "" {
		t.Errorf("something is missing: %+v", info)
	}
	if info.Accel != "kvm" && info.Accel != "tcg" {
		t.Errorf("accelerator %q", info.Accel)
	}
	again, err := l.engine.Info(t.Context())
	if err != nil || !reflect.DeepEqual(again, info) {
		t.Errorf("asked again: %+v, %v", again, err)
	}
}

func (l *lab) bootGolden(t testing.TB) {
	t.Helper()
	p, port := l.place(t, "golden"), l.freePort(t)
	v, err := l.engine.Boot(within(t), l.bootConfig(p, published(port)))
	if err != nil {
		t.Fatal(err)
	}
	l.golden = l.owned(t, v, p, port)
	info := l.golden.startProbe(t)
	if info.BootID == "" {
		t.Errorf("the agent knows no boot id: %+v", info)
	}
	for _, f := range []string{"console.log", "container.log", "vmm.log"} {
		if !exists(filepath.Join(p.Dir, f)) {
			t.Errorf("no %s", f)
		}
	}
}

func (l *lab) takeSnapshot(t testing.TB) {
	t.Helper()
	dir := filepath.Join(l.dir, "snapshot")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// So that memory that the guest counts as free holds something: a clone that
	// gave that back in the wrong way would damage the snapshot.
	l.golden.want(t, "churn 48", "ok")
	l.snapshot = l.golden.take(t, dir, "")
}

// The regions must be the guest's memory: together as large, without gaps in
// the memory file, and with the probe's pattern somewhere in them.
func (l *lab) testRegions(t *testing.T) {
	h := l.golden.Handle()
	var offset int64
	for _, r := range h.Regions {
		if r.Offset != offset || r.Size <= 0 {
			t.Errorf("region %+v, want offset %d", r, offset)
		}
		offset += r.Size
	}
	if offset != memoryBytes {
		t.Fatalf("regions %+v hold %d bytes, want %d", h.Regions, offset, int64(memoryBytes))
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found := 0
	page := make([]byte, 4096)
	for _, r := range h.Regions {
		for at := int64(0); at < r.Size; at += 4096 {
			if _, err := mem.ReadAt(page, int64(r.Addr)+at); err != nil {
				t.Fatalf("read guest memory at %#x: %v", int64(r.Addr)+at, err)
			}
			if isPattern(page) {
				found++
			}
		}
	}
	if found < 4000 {
		t.Errorf("%d pages hold the probe's pattern, want about 4096", found)
	}
}

// isPattern knows a page of the probe's by how its words differ.
func isPattern(page []byte) bool {
	first := binary.LittleEndian.Uint64(page) ^ 0x5bd1e995
	if first == 0x5bd1e995 {
		return false
	}
	for _, i := range []int{8, 2048, 4088} {
		if binary.LittleEndian.Uint64(page[i:])^0x5bd1e995 != first^uint64(i) {
			return false
		}
	}
	return true
}

func (l *lab) testPauseResume(t *testing.T) {
	ctx := within(t)
	for range 2 {
		if err := l.golden.Pause(ctx); err != nil {
			t.Fatal(err)
		}
	}
	// A VM that runs answers within this time, mostly; one that is paused never.
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if answer, err := l.golden.ask(short, "tcp4", "count"); err == nil {
		t.Errorf("a paused guest answers: %q", answer)
	}
	for range 2 {
		if err := l.golden.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	l.golden.want(t, "verify", "ok")
}

func (l *lab) testSaveState(t *testing.T) {
	ctx := within(t)
	if err := l.golden.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(t.TempDir(), "state")
	if err := l.golden.SaveState(ctx, state); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(state)
	if err != nil || len(first) == 0 {
		t.Fatalf("%d bytes of state, error %v", len(first), err)
	}
	if err := l.golden.SaveState(ctx, state); err == nil {
		t.Error("a file that is there was written over")
	}
	second, err := os.ReadFile(state)
	if err != nil || string(second) != string(first) {
		t.Errorf("the file that was there has changed (error %v)", err)
	}
	nowhere := filepath.Join(t.TempDir(), "missing", "state")
	if err := l.golden.SaveState(ctx, nowhere); err == nil {
		t.Error("no error for a directory that is not there")
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if answer, err := l.golden.ask(short, "tcp4", "count"); err == nil {
		t.Errorf("the guest was resumed: it answers %q", answer)
	}
	if err := l.golden.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	l.golden.want(t, "verify", "ok")
}

func (l *lab) testPublished(t *testing.T) {
	if l.noNetwork {
		t.Skip("this engine has no network")
	}
	before := l.golden.count(t)
	// UDP may be lost: a few tries, each with a time of its own.
	var after int
	var err error
	for range 5 {
		ctx, cancel := context.WithTimeout(within(t), 5*time.Second)
		var answer string
		answer, err = l.golden.ask(ctx, "udp4", "count")
		cancel()
		if err == nil {
			after, err = strconv.Atoi(answer)
			break
		}
	}
	if err != nil || after <= before {
		t.Errorf("over UDP the probe says %d, error %v, want more than %d", after, err, before)
	}
}
