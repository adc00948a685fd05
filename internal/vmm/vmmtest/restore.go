package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"fcvm/internal/vmm"
)

// backend is one way in which clones get their memory.
type backend struct {
	name   string
	kind   vmm.Backend
	policy string // of the page server
}

var backends = []backend{
	{"file", vmm.BackendFile, ""},
	{"uffd-share", vmm.BackendUFFD, "share"},
	{"uffd-copy", vmm.BackendUFFD, "copy"},
}

// memory opens a snapshot's memory for clones. Clones may be started as long as
// the test runs.
func (l *lab) memory(t testing.TB, b backend, s *snapshot) vmm.Memory {
	t.Helper()
	if b.kind == vmm.BackendUFFD {
		return l.servePages(t, b, s)
	}
	f, err := os.Open(s.mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return vmm.Memory{Backend: b.kind, File: f}
}

func (l *lab) restoreConfig(p vmm.Place, m vmm.Memory, s *snapshot, ports []vmm.Port) vmm.RestoreConfig {
	return vmm.RestoreConfig{Place: p, Machine: l.machine, Ports: ports, Memory: m, State: s.state}
}

// restore starts a clone of s.
func (l *lab) restore(t testing.TB, m vmm.Memory, s *snapshot) *started {
	t.Helper()
	p, port := l.place(t, "clone"), l.freePort(t)
	v, err := l.engine.Restore(within(t), l.restoreConfig(p, m, s, published(port)))
	if errors.Is(err, vmm.ErrAttach) {
		nothingLeft(t, p)
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l.owned(t, v, p, port)
}

// Two clones go on where the snapshot was taken, each with memory of its own,
// and neither changes the snapshot.
func (l *lab) testRestore(t *testing.T, b backend) {
	before := digest(t, l.snapshot.mem)
	m := l.memory(t, b, l.snapshot)
	one := l.restore(t, m, l.snapshot)
	two := l.restore(t, m, l.snapshot)
	for _, c := range []*started{one, two} {
		if got := c.count(t); got != l.snapshot.count+1 {
			t.Errorf("%s counts %d, want %d", c.place.ID, got, l.snapshot.count+1)
		}
		c.want(t, "verify", "ok")
	}
	one.want(t, "write 1000", "ok")
	for _, c := range []*started{two, one} {
		c.want(t, "verify", "ok")
		if got := c.info(t).BootID; got != l.snapshot.bootID {
			t.Errorf("%s booted as %q, want %q", c.place.ID, got, l.snapshot.bootID)
		}
	}
	if n := size(one.Handle().Regions); n != memoryBytes {
		t.Errorf("regions %+v hold %d bytes, want %d", one.Handle().Regions, n, int64(memoryBytes))
	}
	one.end(t)
	two.want(t, "verify", "ok")
	two.end(t)
	if digest(t, l.snapshot.mem) != before {
		t.Error("a clone has changed the snapshot's memory file")
	}
}

// A clone that has changed is itself a golden VM.
func (l *lab) testSnapshotOfClone(t *testing.T, b backend) {
	clone := l.restore(t, l.memory(t, b, l.snapshot), l.snapshot)
	clone.want(t, "write 700", "ok")
	dir := filepath.Join(l.dir, "second-"+b.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l.cloneAgain(t, b, clone, l.snapshot, dir)
}

// cloneAgain takes a snapshot of a clone of s in dir, and starts a clone of that.
func (l *lab) cloneAgain(t *testing.T, b backend, clone *started, s *snapshot, dir string) *started {
	t.Helper()
	second := clone.take(t, dir, s.mem)
	child := l.restore(t, l.memory(t, b, second), second)
	child.want(t, "verify", "ok")
	if got := child.count(t); got != second.count+1 {
		t.Errorf("the clone's clone counts %d, want %d", got, second.count+1)
	}
	// The parent was only paused.
	if err := clone.Resume(within(t)); err != nil {
		t.Fatal(err)
	}
	clone.want(t, "write 1", "ok")
	clone.want(t, "verify", "ok")
	return child
}

// What a clone gives back must go from its own memory, and from nobody else's.
func (l *lab) testBalloon(t *testing.T, b backend) {
	before := digest(t, l.snapshot.mem)
	m := l.memory(t, b, l.snapshot)
	clone, sibling := l.restore(t, m, l.snapshot), l.restore(t, m, l.snapshot)
	const given = 64 << 20
	all := clone.total(t)
	if err := clone.Balloon(within(t), memoryBytes-given); err != nil {
		t.Fatal(err)
	}
	clone.awaitTotal(t, func(now int) bool { return now <= all-given>>10 })
	clone.want(t, "verify", "ok")
	if err := clone.Balloon(within(t), memoryBytes); err != nil {
		t.Fatal(err)
	}
	clone.awaitTotal(t, func(now int) bool { return now == all })
	clone.want(t, "churn 32", "ok")
	clone.want(t, "write 50", "ok")
	clone.want(t, "verify", "ok")
	sibling.want(t, "verify", "ok")
	late := l.restore(t, m, l.snapshot)
	late.want(t, "verify", "ok")
	if digest(t, l.snapshot.mem) != before {
		t.Error("a clone's balloon has changed the snapshot's memory file")
	}
}

// Guests over 3 GiB have a hole in their physical memory, and it must not be
// one in what is saved and mapped.
func (l *lab) testLarge(t *testing.T) {
	large := *l
	large.machine.MemoryBytes = 4 << 30
	large.machine.CPUs = 2
	large.bootGolden(t)
	dir := filepath.Join(l.dir, "large")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := large.golden.take(t, dir, "")
	if n := size(large.golden.Handle().Regions); n != large.machine.MemoryBytes {
		t.Errorf("regions hold %d bytes, want %d", n, large.machine.MemoryBytes)
	}
	large.golden.end(t)
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			c := large.restore(t, large.memory(t, b, s), s)
			c.want(t, "verify", "ok")
			c.want(t, "churn 64", "ok")
			c.want(t, "verify", "ok")
		})
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
}

// Whenever a start is given up, nothing of it is left.
func (l *lab) testCancelRestore(t *testing.T, b backend) {
	m := l.memory(t, b, l.snapshot)
	for i := range 12 {
		p := l.place(t, "cancel")
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*5*time.Millisecond)
		v, err := l.engine.Restore(ctx, l.restoreConfig(p, m, l.snapshot, published(l.freePort(t))))
		cancel()
		if err == nil {
			// It was in time. That the context has ended since does not touch it.
			l.owned(t, v, p, 0).info(t)
			continue
		}
		nothingLeft(t, p)
	}
}

// total is the guest's memory in KiB, without what its balloon holds.
func (s *started) total(t testing.TB) int {
	t.Helper()
	answer, err := s.ask(within(t), "tcp4", "total")
	if err != nil {
		t.Fatalf("total: %v\n%s", err, s.Tail())
	}
	n, err := strconv.Atoi(answer)
	if err != nil {
		t.Fatalf("total: the probe says %q", answer)
	}
	return n
}

// awaitTotal waits for the guest's balloon, which works on its own.
func (s *started) awaitTotal(t testing.TB, enough func(kib int) bool) {
	t.Helper()
	ctx := within(t)
	for now := s.total(t); !enough(now); now = s.total(t) {
		select {
		case <-ctx.Done():
			t.Fatalf("the balloon stays where the guest has %d KiB", now)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (l *lab) testManyAtOnce(t *testing.T) {
	m := l.memory(t, backends[1], l.snapshot)
	const many = 6
	clones := make([]*started, many)
	errs := make([]error, many)
	var wg sync.WaitGroup
	for i := range many {
		p, port := l.place(t, fmt.Sprintf("many%d", i)), l.freePort(t)
		wg.Go(func() {
			v, err := l.engine.Restore(within(t), l.restoreConfig(p, m, l.snapshot, published(port)))
			if err != nil {
				errs[i] = err
				return
			}
			clones[i] = l.owned(t, v, p, port)
		})
	}
	wg.Wait()
	for i, c := range clones {
		if errors.Is(errs[i], vmm.ErrAttach) {
			t.Skip(errs[i])
		}
		if errs[i] != nil {
			t.Errorf("clone %d: %v", i, errs[i])
			continue
		}
		c.want(t, "verify", "ok")
	}
}

// digest tells whether a file has changed. In a lab that is itself emulated, FNV is 35
// times as fast as SHA-256, which took half of the suite's time there.
func digest(t testing.TB, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := fnv.New64a()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return h.Sum64()
}
