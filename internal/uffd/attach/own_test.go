//go:build linux && amd64

package attach_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/attach"
	"fcvm/internal/uffd/uffdtest"
)

// firstPiece is how much of the file the VMM maps first.
const firstPiece = 20 * page

// ownChild maps the file that it inherited as descriptor 3, in two pieces, as
// Firecracker maps a snapshot's memory: by a path of its own. It obeys as child
// does, and "b PAGE" puts anonymous memory over a page, as its balloon does.
func ownChild(tooMuch bool) {
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_NORESERVE
	f, err := os.Open("/proc/self/fd/3")
	if err != nil {
		fmt.Println("open:", err)
		return
	}
	other, err := os.Open("/proc/self/exe")
	if err != nil {
		fmt.Println("open:", err)
		return
	}
	second := uintptr(size - firstPiece)
	if tooMuch {
		second += page
	}
	var base [2]uintptr
	for _, m := range []struct {
		to     *uintptr
		n      uintptr
		flags  int
		fd     uintptr
		offset uintptr
	}{
		// Alike, but not the file's, or not as guest memory is mapped.
		{new(uintptr), size, flags, other.Fd(), 0},
		{new(uintptr), size, unix.MAP_PRIVATE, f.Fd(), 0},
		{&base[0], firstPiece, flags, f.Fd(), 0},
		{&base[1], second, flags, f.Fd(), firstPiece},
	} {
		if *m.to, err = mmapFile(0, m.n, prot, m.flags, int(m.fd), m.offset); err != nil {
			fmt.Println("mmap:", err)
			return
		}
	}
	fmt.Printf("base %#x\n%#x\n", base[0], base[1])
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		op, arg, _ := strings.Cut(in.Text(), " ")
		n, _ := strconv.Atoi(arg)
		at := base[0] + uintptr(n)*page
		if n*page >= firstPiece {
			at = base[1] + uintptr(n)*page - firstPiece
		}
		if op == "b" {
			_, err := mmap(at, page, prot, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
			fmt.Println(err)
			continue
		}
		fmt.Println(memory(op, at))
	}
}

func ownCommand(t *testing.T, mode string, f *os.File) *vmm {
	t.Helper()
	v := command(t, mode)
	v.cmd.ExtraFiles = []*os.File{f}
	return v
}

// A VMM that maps the file itself gets a userfaultfd over all pieces of it, and
// over nothing else.
func TestOwnMapping(t *testing.T) {
	uffdtest.Require(t)
	f := template(t)
	v := ownCommand(t, "own", f)
	a := v.start(t, attach.Config{Size: size, File: f, Own: true, Userfault: true})
	second, err := strconv.ParseUint(v.line(t), 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	want := []attach.Piece{{Addr: a.Addr, Size: firstPiece}, {Addr: second, Size: size - firstPiece, Offset: firstPiece}}
	if len(a.Pieces) != 2 || a.Pieces[0] != want[0] || a.Pieces[1] != want[1] {
		t.Fatalf("pieces %+v, want %+v", a.Pieces, want)
	}
	// What is in the file is mapped without a fault, shared until it is written.
	for _, c := range [][2]string{{"r 2", "3"}, {"w 2", "3"}, {"r 2", "119"}, {"r 22", "23"}} {
		if got := v.ask(t, c[0]); got != c[1] {
			t.Errorf("%s: got %s, want %s", c[0], got, c[1])
		}
	}
	// Holes fault, in both pieces.
	for i, at := range map[int]uint64{1: a.Addr + page, 21: second + 21*page - firstPiece} {
		v.send(t, fmt.Sprintf("r %d", i))
		ev := uffdtest.Next(t, a.UFFD, 1)[0]
		if ev.Type != uffd.EventPageFault || ev.Address != at {
			t.Fatalf("page %d: got %+v, want a fault at %#x", i, ev, at)
		}
		if _, err := a.UFFD.Copy(at, bytes.Repeat([]byte{byte(100 + i)}, page)); err != nil {
			t.Fatal(err)
		}
		if got := v.line(t); got != strconv.Itoa(100+i) {
			t.Errorf("page %d: read %s", i, got)
		}
	}
	// What the balloon gave back is zeros, and nobody's business any more.
	for _, i := range []int{3, 2} {
		if got := v.ask(t, fmt.Sprintf("b %d", i)); got != "<nil>" {
			t.Fatalf("balloon: %s", got)
		}
		if got := v.ask(t, fmt.Sprintf("r %d", i)); got != "0" {
			t.Errorf("page %d after the balloon: read %s", i, got)
		}
	}
	// The file keeps what it had.
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 2*page); err != nil || b[0] != 3 {
		t.Errorf("the file's page 2 has %d, error %v", b[0], err)
	}
}

func TestOwnMappingWithoutUserfault(t *testing.T) {
	f := template(t)
	v := ownCommand(t, "own", f)
	a := v.start(t, attach.Config{Size: size, File: f, Own: true})
	v.line(t)
	if a.UFFD != nil || len(a.Pieces) != 2 {
		t.Errorf("got %+v", a)
	}
	if got := v.ask(t, "r 1"); got != "0" {
		t.Errorf("a hole: read %s", got)
	}
}

// A VMM in a jail maps what stands in for the file, and gets the file.
func TestStandIn(t *testing.T) {
	uffdtest.Require(t)
	f := template(t)
	standIn, err := os.Create(filepath.Join(t.TempDir(), "stand-in"))
	if err != nil {
		t.Fatal(err)
	}
	defer standIn.Close()
	if err := standIn.Truncate(size); err != nil {
		t.Fatal(err)
	}
	v := ownCommand(t, "own jailed", standIn)
	a := v.start(t, attach.Config{Size: size, File: f, Own: true, StandIn: standIn, Userfault: true})
	v.line(t)
	if len(a.Pieces) != 2 || a.Pieces[1].Offset != firstPiece {
		t.Fatalf("pieces %+v", a.Pieces)
	}
	for _, c := range [][2]string{{"r 2", "3"}, {"w 2", "3"}, {"r 2", "119"}, {"r 22", "23"}} {
		if got := v.ask(t, c[0]); got != c[1] {
			t.Errorf("%s: got %s, want %s", c[0], got, c[1])
		}
	}
	v.send(t, "r 1")
	ev := uffdtest.Next(t, a.UFFD, 1)[0]
	if _, err := a.UFFD.Copy(ev.Address, bytes.Repeat([]byte{101}, page)); err != nil {
		t.Fatal(err)
	}
	if got := v.line(t); got != "101" {
		t.Errorf("read %s", got)
	}
	// It keeps no descriptor of the file.
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", v.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	want, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if have, err := os.Stat(fd); err == nil && os.SameFile(have, want) {
			t.Errorf("it still has the file as %s", fd)
		}
	}
}

// Memory that nobody would answer for must not run.
func TestOwnMappingOfMoreThanTheGuestHas(t *testing.T) {
	f := template(t)
	v := ownCommand(t, "own too much", f)
	_, err := attach.Start(t.Context(), v.cmd, attach.Config{Size: size, File: f, Own: true})
	if err == nil || !strings.Contains(err.Error(), "more memory than its snapshot") {
		t.Fatalf("got %v", err)
	}
	gone(t, v)
}
