//go:build linux

package uffd_test

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/uffdtest"
)

const page = uffdtest.PageSize

func TestMain(m *testing.M) { os.Exit(uffdtest.Main(m)) }

// register maps pages of anonymous memory and registers them.
func register(t *testing.T, f *uffd.FD, pages int) (mem []byte, addr uint64) {
	t.Helper()
	mem = uffdtest.Map(t, pages, -1)
	addr = uffdtest.Address(mem)
	can, err := f.Register(addr, uint64(len(mem)), uffd.ModeMissing)
	if err != nil {
		t.Fatal(err)
	}
	if need := uffd.CanCopy | uffd.CanWake | uffd.CanZeroPage; can&need != need {
		t.Fatalf("range allows %#x, want %#x", can, need)
	}
	return mem, addr
}

func TestCopyAnswersReadFault(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 4)
	got := uffdtest.Touch(t, mem, page+5, false)
	ev := uffdtest.Next(t, f, 1)[0]
	if ev.Type != uffd.EventPageFault || ev.Write || ev.Address != addr+page {
		t.Fatalf("got %+v, want a read of %#x", ev, addr+page)
	}
	if n, err := f.Copy(ev.Address, bytes.Repeat([]byte{9}, page)); err != nil || n != page {
		t.Fatal(n, err)
	}
	if b := <-got; b != 9 {
		t.Fatalf("read %d, want 9", b)
	}
}

func TestWriteFaultIsToldApart(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 1)
	got := uffdtest.Touch(t, mem, 0, true)
	if ev := uffdtest.Next(t, f, 1)[0]; !ev.Write || ev.Address != addr {
		t.Fatalf("got %+v, want a write", ev)
	}
	if n, err := f.ZeroPage(addr, page); err != nil || n != page {
		t.Fatal(n, err)
	}
	if b := <-got; b != 0x77 || mem[1] != 0 {
		t.Fatalf("read %#x and %#x", b, mem[1])
	}
}

func TestCopyOverPresentPages(t *testing.T) {
	f := uffdtest.Open(t)
	_, addr := register(t, f, 4)
	one := bytes.Repeat([]byte{1}, page)
	if _, err := f.Copy(addr+2*page, one); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Copy(addr+2*page, one); !errors.Is(err, uffd.ErrExist) || n != 0 {
		t.Fatalf("copy over a present page: %d, %v", n, err)
	}
	if n, err := f.Copy(addr, make([]byte, 4*page)); !errors.Is(err, uffd.ErrAgain) || n != 2*page {
		t.Fatalf("copy up to a present page: %d, %v", n, err)
	}
	if n, err := f.ZeroPage(addr+2*page, page); !errors.Is(err, uffd.ErrExist) || n != 0 {
		t.Fatalf("zero a present page: %d, %v", n, err)
	}
}

func TestNotRegistered(t *testing.T) {
	f := uffdtest.Open(t)
	_, addr := register(t, f, 1)
	if err := f.Unregister(addr, page); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Copy(addr, make([]byte, page)); !errors.Is(err, uffd.ErrNotRegistered) {
		t.Fatalf("got %v", err)
	}
	if err := f.Wake(addr, page); err != nil {
		t.Fatalf("wake: %v", err)
	}
}

// While a REMOVE waits to be read nothing can be placed, not even elsewhere.
func TestRemoveBlocksCopy(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 4)
	if _, err := f.Copy(addr, bytes.Repeat([]byte{1}, 2*page)); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- unix.Madvise(mem[:2*page], unix.MADV_DONTNEED) }()
	uffdtest.Await(t, f)
	_, copied := f.Copy(addr+3*page, make([]byte, page))
	if !errors.Is(copied, uffd.ErrAgain) {
		t.Fatalf("copy beside a pending remove: %v", copied)
	}
	ev := uffdtest.Next(t, f, 1)[0]
	if ev.Type != uffd.EventRemove || ev.Address != addr || ev.End != addr+2*page {
		t.Fatalf("got %+v", ev)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := f.Copy(addr+3*page, make([]byte, page)); err != nil {
		t.Fatalf("copy after the remove: %v", err)
	}
}

func TestClosed(t *testing.T) {
	f := uffdtest.Open(t)
	_, addr := register(t, f, 1)
	for range 2 {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var buf uffd.Buffer
	_, rerr := f.ReadEvents(&buf)
	_, cerr := f.Copy(addr, make([]byte, page))
	for _, err := range []error{rerr, cerr, f.Wake(addr, page), f.Use(func(int) error { return nil })} {
		if !errors.Is(err, uffd.ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
	}
}

// Who waits for events in read(2) gets them, and can be told to wait no longer.
func TestWaitEvents(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 1)
	if err := f.SetBlocking(true); err != nil {
		t.Fatal(err)
	}
	tid, got := make(chan int), make(chan []uffd.Event)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		for range 2 {
			var buf uffd.Buffer
			events, err := f.WaitEvents(&buf, uffd.MaxEvents)
			if err != nil {
				t.Error(err)
			}
			got <- events
		}
	}()
	waiter := <-tid
	touched := uffdtest.Touch(t, mem, 0, false)
	if ev := <-got; len(ev) != 1 || ev[0].Address != addr {
		t.Errorf("got %+v", ev)
	}
	if _, err := f.ZeroPage(addr, page); err != nil {
		t.Fatal(err)
	}
	<-touched
	if err := f.SetBlocking(false); err != nil {
		t.Fatal(err)
	}
	for {
		// Again, as it may not have begun to wait before.
		if err := unix.Tgkill(unix.Getpid(), waiter, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
		select {
		case ev := <-got:
			if len(ev) != 0 {
				t.Errorf("got %+v", ev)
			}
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// Of several events, as many are read as were asked for.
func TestWaitForSomeEvents(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 3)
	if err := f.SetBlocking(true); err != nil {
		t.Fatal(err)
	}
	var touched []<-chan byte
	for i := range 3 {
		touched = append(touched, uffdtest.Touch(t, mem, i*page, false))
	}
	var buf uffd.Buffer
	seen := map[uint64]bool{}
	for len(seen) < 3 {
		events, err := f.WaitEvents(&buf, 1)
		if err != nil || len(events) != 1 {
			t.Fatalf("got %+v, error %v", events, err)
		}
		seen[events[0].Address] = true
	}
	if _, err := f.ZeroPage(addr, 3*page); err != nil {
		t.Fatal(err)
	}
	for _, done := range touched {
		<-done
	}
}

// What was read into shared memory, and not cleared, is there for a successor.
func TestEventsOutliveTheirReader(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 4)
	shared := make([]byte, uffd.BufferSize)
	buf := uffd.BufferOver(shared)
	done := make(chan error, 1)
	go func() { done <- unix.Madvise(mem[page:3*page], unix.MADV_DONTNEED) }()
	uffdtest.Await(t, f)
	if _, err := f.ReadEvents(buf); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want := uffd.Event{Type: uffd.EventRemove, Address: addr + page, End: addr + 3*page}
	if left, err := uffd.Left(shared); err != nil || len(left) != 1 || left[0] != want {
		t.Errorf("left are %+v, %v", left, err)
	}
	buf.Clear()
	if left, err := uffd.Left(shared); err != nil || len(left) != 0 {
		t.Errorf("after Clear: %+v, %v", left, err)
	}
	shared[msgSize] = 0x99
	if _, err := uffd.Left(shared); err == nil {
		t.Error("nonsense was taken for an event")
	}
}

const msgSize = 32

// The number must stay the userfaultfd's for as long as somebody uses it.
func TestCloseWaitsForUsers(t *testing.T) {
	f := uffdtest.Open(t)
	var wg sync.WaitGroup
	inUse, release := make(chan struct{}), make(chan struct{})
	wg.Go(func() {
		err := f.Use(func(fd int) error {
			close(inUse)
			<-release
			_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			return err
		})
		if err != nil {
			t.Errorf("descriptor went away under its user: %v", err)
		}
	})
	<-inUse
	closed := make(chan struct{})
	wg.Go(func() { f.Close(); close(closed) })
	select {
	case <-closed:
		t.Error("Close did not wait")
	default:
	}
	close(release)
	wg.Wait()
}

func TestFromFD(t *testing.T) {
	f := uffdtest.Open(t)
	var dup int
	if err := f.Use(func(fd int) (err error) { dup, err = unix.Dup(fd); return err }); err != nil {
		t.Fatal(err)
	}
	g, err := uffd.FromFD(dup)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	_, addr := register(t, g, 1)
	if _, err := f.Copy(addr, make([]byte, page)); err != nil {
		t.Fatal(err)
	}

	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	if _, err := uffd.FromFD(p[0]); err == nil {
		t.Fatal("a pipe was taken for a userfaultfd")
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Fatalf("refused descriptor is still open: %v", err)
	}
}
