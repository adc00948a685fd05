//go:build linux

package pstest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// patience is that of a [Script] that has none of its own.
const patience = 30 * time.Second

// runner carries out a script inside a VMM.
type runner struct {
	vmm     *vmmProcess
	memory  *memory
	clone   uint16
	script  *Script
	result  *Result
	threads []thread
	barrier barrier
	begin   time.Time
	clock   time.Duration // CLOCK_MONOTONIC at begin
	// strict is memory in which pages that were given back are zeros.
	strict bool
	// stop ends histories early.
	stop atomic.Bool
}

// thread is one of a script's. What it does stands in the atomics, for whoever
// has to tell why it does not go on.
type thread struct {
	*runner
	number int
	tid    atomic.Int64
	// at is the operation, counted from 1, in the upper 24 bits, and below that how
	// many accesses it has begun.
	at atomic.Uint64
	// page is what a history or a removal is at, and latest the last version that a
	// history writes.
	page   atomic.Uint32
	latest atomic.Uint32
	done   atomic.Bool
	_      [64]byte // keeps the next one's away
}

const atShift = 40

// run returns when all threads are done, or else what hangs.
func (v *vmmProcess) run(s *Script) (*Result, []string) {
	r := &runner{
		vmm: v, memory: v.memory, clone: v.config.Clone, strict: v.config.Shape != Template, script: s,
		result: &Result{Threads: make([][]Outcome, len(s.Threads))},
	}
	r.threads = make([]thread, len(s.Threads))
	r.barrier.init(len(s.Threads))
	r.begin, r.clock = time.Now(), Clock()
	var wg sync.WaitGroup
	for i := range r.threads {
		t := &r.threads[i]
		t.runner, t.number = r, i
		r.result.Threads[i] = make([]Outcome, len(s.Threads[i]))
		wg.Go(t.run)
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	if hung := r.watch(done); hung != nil {
		return nil, hung
	}
	return r.result, nil
}

// watch looks whether threads go on.
func (r *runner) watch(done <-chan struct{}) []string {
	limit := r.script.Patience
	if limit == 0 {
		limit = patience
	}
	const looks = 8 // the clock of a machine that sleeps may jump once
	before, same, allSame := make([]uint64, len(r.threads)), make([]int, len(r.threads)), 0
	for {
		select {
		case <-done:
			return nil
		case <-time.After(limit / looks):
		}
		hung := false
		allSame++
		for i := range r.threads {
			t := &r.threads[i]
			switch now := t.at.Load(); {
			case now != before[i]:
				before[i], same[i], allSame = now, 0, 0
			case !t.done.Load() && now != 0 && t.op().Kind.accesses():
				same[i]++
				hung = hung || same[i] >= looks
			}
		}
		if hung || allSame >= looks {
			return r.describe()
		}
	}
}

// op is what the thread is at, once it has begun.
func (t *thread) op() *Op {
	return &t.script.Threads[t.number][int(t.at.Load()>>atShift)-1]
}

// describe tells what each thread is at.
func (r *runner) describe() (lines []string) {
	for i := range r.threads {
		t := &r.threads[i]
		if t.done.Load() {
			continue
		}
		at := t.at.Load()
		if at == 0 {
			lines = append(lines, fmt.Sprintf("thread %d: has not begun", i))
			continue
		}
		number, n := int(at>>atShift)-1, int(at&(1<<atShift-1))
		op := t.op()
		what := fmt.Sprintf("thread %d: operation %d, %s", i, number, op.Kind)
		switch list := op.Pages.list(); {
		case op.Kind == History:
			what += fmt.Sprintf(" with seed %d, its operation %d, page %d", op.History.Seed, n-1, t.page.Load())
		case op.Kind == Remove, op.Kind == Unmap:
			what += fmt.Sprintf(" of page %d", t.page.Load())
		case n > 0 && n <= len(list):
			what += fmt.Sprintf(" of page %d", list[n-1])
		}
		lines = append(lines, what+", "+threadState(int(t.tid.Load())))
	}
	return lines
}

// threadState is what the kernel says of a thread of this process.
func threadState(tid int) string {
	wchan, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/wchan", tid))
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("tid %d, state %c, wchan %s", tid, taskState("self", tid), wchan)
}

// taskState is the state of a thread, or '?'.
func taskState(pid string, tid int) byte {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%s/task/%d/stat", pid, tid))
	if err != nil {
		return '?'
	}
	return stateIn(stat)
}

// stateIn finds the state in a line of proc_pid_stat(5), behind the name, which may
// contain anything.
func stateIn(stat []byte) byte {
	if i := bytes.LastIndexByte(stat, ')'); i >= 0 && i+2 < len(stat) {
		return stat[i+2]
	}
	return '?'
}

func (t *thread) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t.tid.Store(int64(unix.Gettid()))
	defer t.done.Store(true)
	for i := range t.script.Threads[t.number] {
		op, o := &t.script.Threads[t.number][i], &t.result.Threads[t.number][i]
		list := op.Pages.list()
		if op.Latencies {
			o.Latencies = make([]uint32, len(list))
			for i := range o.Latencies {
				o.Latencies[i] = 1 // else its memory would be a part of what is measured
			}
		}
		t.at.Store(uint64(i+1) << atShift)
		begin := time.Since(t.begin)
		if err := t.do(op, list, o); err != nil {
			o.complain("%s: %v", op.Kind, err)
		}
		o.Began, o.Elapsed = t.clock+begin, time.Since(t.begin)-begin
	}
	t.barrier.leave()
}

// Clock is the time of CLOCK_MONOTONIC, which all processes have in common.
func Clock() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // every kernel has it
	}
	return time.Duration(ts.Nano())
}

// step tells which access begins.
func (t *thread) step(n int) { t.at.Store(t.at.Load()&^(1<<atShift-1) | uint64(n)) }

func (t *thread) do(op *Op, list []uint32, o *Outcome) error {
	switch op.Kind {
	case Read, Write:
		return t.touch(op, list, o)
	case Fill, Check, CheckWord, Sum:
		return t.whole(op, list, o)
	case Remove, Unmap:
		return t.giveUp(op, list)
	case Barrier:
		t.barrier.wait()
	case Sleep:
		if op.Until != 0 {
			time.Sleep(op.Until - Clock())
		}
		time.Sleep(op.Wait)
	case Connect:
		if op.Handshake == nil {
			return errors.New("it has no socket")
		}
		return t.vmm.shakeHands(op.Handshake)
	case AwaitAsleep:
		for i, n := range op.Others {
			if n < 0 || n >= len(t.threads) || len(op.Steps) != len(op.Others) {
				return fmt.Errorf("there is no step of thread %d", n)
			}
			t.threads[n].awaitAsleep(op.Steps[i])
		}
	case Freeze:
		return freeze(op.PID)
	case Thaw:
		return unix.Kill(op.PID, unix.SIGCONT)
	case History:
		if op.History == nil {
			return errors.New("it has no seed")
		}
		t.history(op.History, o)
	case Exit:
		unix.Exit(7)
	case Die:
		return unix.Kill(os.Getpid(), unix.SIGKILL)
	default:
		return errors.New("it is not known")
	}
	return nil
}

// touch reads or writes one word of each page.
func (t *thread) touch(op *Op, list []uint32, o *Outcome) error {
	pages := t.memory.pages
	sum := uint64(0)
	value := mark{clone: t.clone, version: max(op.Version, 1)}
	for i, p := range list {
		if int(p) >= len(pages) || pages[p] == nil {
			return fmt.Errorf("there is no page %d", p)
		}
		t.step(i + 1)
		page := pages[p]
		value.page = p
		word := value.first()
		var begin time.Duration
		if op.Latencies {
			begin = time.Since(t.begin)
		}
		if op.Kind == Write || i < len(op.Writes) && op.Writes[i] {
			put(page, 0, word)
		} else {
			sum += get(page, 0)
		}
		if op.Latencies {
			o.Latencies[i] = uint32(min(time.Since(t.begin)-begin, 1<<32-1))
		}
	}
	o.Sum = sum
	return nil
}

// whole works on every word of each page.
func (t *thread) whole(op *Op, list []uint32, o *Outcome) error {
	for i, p := range list {
		if int(p) >= len(t.memory.pages) || t.memory.pages[p] == nil {
			return fmt.Errorf("there is no page %d", p)
		}
		t.step(i + 1)
		page := t.memory.pages[p]
		switch op.Kind {
		case Fill:
			mark{t.clone, p, max(op.Version, 1)}.fill(page)
		case Check:
			o.check(page, int(p), op.Expect)
		case CheckWord:
			o.checkWord(page, int(p), op.Expect)
		case Sum:
			for i := range words {
				o.Sum += *wordAt(page, i)
			}
		}
	}
	return nil
}

// giveUp removes or unmaps, as much at once as the order allows.
func (t *thread) giveUp(op *Op, list []uint32) error {
	for step := 1; ; {
		for i := 0; i < len(list); step++ {
			n := 1
			for i+n < len(list) && list[i+n] == list[i]+uint32(n) {
				n++
			}
			t.step(step)
			t.page.Store(list[i])
			mem, err := t.memory.span(int(list[i]), n)
			if err == nil && op.Kind == Unmap {
				err = munmap(mem)
			} else if err == nil {
				err = unix.Madvise(mem, unix.MADV_DONTNEED)
			}
			if err != nil {
				return err
			}
			i += n
			if len(op.Others) > 0 && t.through(op.Others) {
				return nil
			}
		}
		if len(op.Others) == 0 || len(list) == 0 {
			return nil
		}
	}
}

// through tells whether all these threads are.
func (t *thread) through(others []int) bool {
	for _, n := range others {
		if n != t.number && !t.threads[n].done.Load() {
			return false
		}
	}
	return true
}

// awaitAsleep waits until the thread sleeps in an operation, and not before it, or is
// beyond it.
func (t *thread) awaitAsleep(step int) {
	for {
		number := int(t.at.Load()>>atShift) - 1
		if number > step || t.done.Load() {
			return
		}
		if number == step {
			if s := taskState("self", int(t.tid.Load())); s == 'S' || s == 'D' {
				return
			}
		}
		nap()
	}
}

// freeze stops a process and waits until none of its threads runs.
func freeze(pid int) error {
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return err
	}
	for {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		stopped := true
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if s := taskState(strconv.Itoa(pid), tid); err == nil && s != 'T' && s != '?' {
				stopped = false
			}
		}
		if stopped {
			return nil
		}
		nap()
	}
}

// nap is some microseconds. To time.Sleep, less than a millisecond is one, when the
// runtime has nothing else to do.
func nap() {
	ts := unix.NsecToTimespec(20_000)
	_ = unix.Nanosleep(&ts, nil)
}

// list is the pages in their order.
func (p Pages) list() []uint32 {
	if p.List != nil {
		return p.List
	}
	list := make([]uint32, p.Count)
	for i := range list {
		list[i] = uint32(p.First + i)
	}
	if p.Shuffle != 0 {
		rnd := rand.New(rand.NewPCG(p.Shuffle, 0))
		rnd.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	}
	return list
}

// barrier lets threads go when all that are left have come.
type barrier struct {
	mu      sync.Mutex
	all     sync.Cond
	members int
	waiting int
	round   int
}

func (b *barrier) init(n int) { b.members, b.all.L = n, &b.mu }

func (b *barrier) wait() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting++
	if b.waiting >= b.members {
		b.next()
		return
	}
	for round := b.round; round == b.round; {
		b.all.Wait()
	}
}

// leave takes out a thread that is done.
func (b *barrier) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.members--; b.waiting > 0 && b.waiting >= b.members {
		b.next()
	}
}

func (b *barrier) next() {
	b.waiting = 0
	b.round++
	b.all.Broadcast()
}
