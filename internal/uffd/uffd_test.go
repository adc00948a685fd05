//go:build linux

package uffd_test

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"testing"

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

// next waits until at least n events came.
func next(t *testing.T, f *uffd.FD, n int) []uffd.Event {
	t.Helper()
	var got []uffd.Event
	var buf uffd.Buffer
	err := f.WaitReadable(func() bool {
		for {
			ev, err := f.ReadEvents(&buf)
			if err != nil {
				t.Error(err)
				return false
			}
			if len(ev) == 0 {
				return len(got) < n
			}
			got = append(got, ev...)
		}
	})
	if err != nil || t.Failed() {
		t.Fatal("wait for events:", err)
	}
	return got
}

func TestCopyAnswersReadFault(t *testing.T) {
	f := uffdtest.Open(t)
	mem, addr := register(t, f, 4)
	got := uffdtest.Touch(t, mem, page+5, false)
	ev := next(t, f, 1)[0]
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
	if ev := next(t, f, 1)[0]; !ev.Write || ev.Address != addr {
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
	var copied error
	if err := f.WaitReadable(func() bool {
		// Readable, and not read yet.
		var p = []unix.PollFd{{Events: unix.POLLIN}}
		_ = f.Use(func(fd int) error { p[0].Fd = int32(fd); return nil })
		if n, _ := unix.Poll(p, 0); n == 0 {
			return true
		}
		_, copied = f.Copy(addr+3*page, make([]byte, page))
		return false
	}); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(copied, uffd.ErrAgain) {
		t.Fatalf("copy beside a pending remove: %v", copied)
	}
	ev := next(t, f, 1)[0]
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
	waiting := make(chan error, 1)
	go func() { waiting <- f.WaitReadable(func() bool { return true }) }()
	for range 2 {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-waiting; !errors.Is(err, uffd.ErrClosed) {
		t.Fatalf("waiter got %v", err)
	}
	var buf uffd.Buffer
	_, rerr := f.ReadEvents(&buf)
	_, cerr := f.Copy(addr, make([]byte, page))
	for _, err := range []error{rerr, cerr, f.Wake(addr, page), f.Use(func(int) error { return nil }), f.WaitReadable(func() bool { return false })} {
		if !errors.Is(err, uffd.ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
	}
}

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
