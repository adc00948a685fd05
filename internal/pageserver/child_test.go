//go:build linux

package pageserver

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/uffdtest"
)

const (
	guestSize = testPages * pageSize
	// envGuest is the size of a VMM's memory where it is not guestSize.
	envGuest = "FCVM_TEST_GUEST"
)

// child is the other process of a test: one that does nothing, or a VMM.
//
// "firecracker SOCKET" maps anonymous memory, and shakes hands itself, without a
// pidfd, in the order that Firecracker does. "attached" maps its memory as QEMU
// does, for internal/uffd/attach. Both then obey commands on standard input, and
// answer each with a line:
//
//	check    reads every page, and compares it with the snapshot
//	w PAGE   writes 0x77 to its first byte
//	d PAGE N gives pages back
//	race N   reads, writes and gives back, from four threads, N times each
//	fault    answers, and then reads a page
//	touch    reads a byte of every page, and answers how many nanoseconds that took
func child(mode string) int {
	var base uintptr
	var err error
	size := uintptr(guestSize)
	if n, err := strconv.Atoi(os.Getenv(envGuest)); err == nil {
		size = uintptr(n)
	}
	switch mode {
	case "stand":
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	case "firecracker":
		base, err = mmap(0, size, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err == nil {
			var conn *net.UnixConn
			if conn, err = shakeHands(os.Args[1], base, size); err == nil {
				defer conn.Close()
			}
		}
	case "attached":
		if base, err = mmap(0, size, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err == nil {
			base, err = mmap(base, size, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
		}
	default:
		return 2
	}
	if err != nil {
		fmt.Println("error:", err)
		return 1
	}
	fmt.Printf("base %#x\n", base)
	guest := uffdtest.At(base, int(size))
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		f := strings.Fields(in.Text())
		n := make([]int, 3)
		for i := range min(len(f)-1, 3) {
			n[i], _ = strconv.Atoi(f[i+1])
		}
		switch f[0] {
		case "check":
			fmt.Println(check(guest))
		case "w":
			guest[n[0]*pageSize] = 0x77
			fmt.Println("ok")
		case "d":
			fmt.Println(unix.Madvise(guest[n[0]*pageSize:(n[0]+n[1])*pageSize], unix.MADV_DONTNEED))
		case "race":
			fmt.Println(race(guest, n[0], mode == "firecracker"))
		case "touch":
			begin, sum := time.Now(), 0
			for at := 0; at < len(guest); at += pageSize {
				sum += int(guest[at])
			}
			fmt.Println(time.Since(begin).Nanoseconds(), sum)
		case "fault":
			fmt.Println("ok")
			fmt.Println(guest[n[0]*pageSize])
		}
	}
	return 0
}

// The main thread is the one that is attached to.
func init() {
	if os.Getenv(envChild) == "attached" {
		runtime.LockOSThread()
	}
}

func mmap(at, size uintptr, flags int) (uintptr, error) {
	none := -1
	p, _, errno := unix.Syscall6(unix.SYS_MMAP, at, size, unix.PROT_READ|unix.PROT_WRITE, uintptr(flags), uintptr(uint32(none)), 0)
	if errno != 0 {
		return 0, errno
	}
	return p, nil
}

// shakeHands does what Firecracker does. The userfaultfd stays open.
func shakeHands(socket string, base, size uintptr) (*net.UnixConn, error) {
	f, err := uffd.Open()
	if err != nil {
		return nil, err
	}
	if _, err := f.API(uffd.FeatureEventRemove); err != nil {
		return nil, err
	}
	if _, err := f.Register(uint64(base), uint64(size), uffd.ModeMissing); err != nil {
		return nil, err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return conn, f.Use(func(fd int) error {
		return SendHandshake(conn, fd, -1, []Mapping{{Addr: uint64(base), Size: uint64(size)}})
	})
}

// check compares the whole memory with the snapshot.
func check(guest []byte) string {
	var bad []int
	for p := range testPages {
		if !bytes.Equal(guest[p*pageSize:(p+1)*pageSize], content(p)) {
			bad = append(bad, p)
		}
	}
	return fmt.Sprint("bad ", bad)
}

// race has four threads that each own every fourth page. An owner writes to, and
// gives back, its own pages, and knows what they must hold then. All read all
// pages: what belongs to somebody else is what the snapshot has, zeros, or what
// its owner writes. With strict, a page that was given back is zeros; a template
// may show through otherwise.
func race(guest []byte, rounds int, strict bool) string {
	const owners = 4
	problems := make(chan string, owners)
	var wg sync.WaitGroup
	zero := make([]byte, pageSize)
	for owner := range owners {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(owner), 1))
			given := make([]bool, testPages)
			dirty := make([]bool, testPages)
			for range rounds {
				p := rnd.IntN(testPages/owners)*owners + owner
				mine := guest[p*pageSize : (p+1)*pageSize]
				switch rnd.IntN(4) {
				case 0:
					if err := unix.Madvise(mine, unix.MADV_DONTNEED); err != nil {
						problems <- err.Error()
						return
					}
					given[p], dirty[p] = true, false
				case 1:
					mine[8], dirty[p] = 0xee, true
				}
				want := content(p)
				if given[p] && (strict || bytes.Equal(mine[16:], zero[16:])) {
					want = make([]byte, pageSize)
				}
				if dirty[p] {
					want[8] = 0xee
				}
				if !bytes.Equal(mine, want) {
					problems <- fmt.Sprintf("page %d: %x… instead of %x… (given back %v, written %v)", p, mine[:16], want[:16], given[p], dirty[p])
					return
				}
				other := rnd.IntN(testPages)
				if b := guest[other*pageSize+16]; b != 0 && b != content(other)[16] {
					problems <- fmt.Sprintf("page %d has %x", other, b)
					return
				}
			}
		})
	}
	wg.Wait()
	close(problems)
	if p, ok := <-problems; ok {
		return p
	}
	return "fine"
}
