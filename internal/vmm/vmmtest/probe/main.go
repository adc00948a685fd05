// Command probe is the program inside the guests of vmmtest. It holds memory
// with a known pattern, and answers over TCP and UDP, port 80, one line for
// each line:
//
//	count    how often this was asked
//	verify   "ok", or what is wrong with the pattern
//	write N  rewrites N pages with a new pattern, which verify then expects
//	churn N  fills N MiB of other memory and gives them back to the kernel
//	total    the guest's memory in KiB, without what its balloon holds
//
// With a line as its argument, it asks the probe that runs already.
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

const (
	pageSize = 4096
	pages    = 4096 // 16 MiB
)

// held is memory with a pattern: each page's words tell page and generation.
type held struct {
	mu    sync.Mutex // guards all
	count int
	mem   []byte
	gen   []uint32 // of each page
}

func (h *held) fill(page int, gen uint32) {
	h.gen[page] = gen
	b := h.mem[page*pageSize:][:pageSize]
	for i := 0; i < pageSize; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], word(page, i, gen))
	}
}

func word(page, i int, gen uint32) uint64 {
	return uint64(page)<<44 ^ uint64(gen)<<16 ^ uint64(i) ^ 0x5bd1e995
}

func (h *held) verify() string {
	for page := range pages {
		b := h.mem[page*pageSize:][:pageSize]
		for i := 0; i < pageSize; i += 8 {
			if got, want := binary.LittleEndian.Uint64(b[i:]), word(page, i, h.gen[page]); got != want {
				return fmt.Sprintf("page %d byte %d: %#x, want %#x", page, i, got, want)
			}
		}
	}
	return "ok"
}

func (h *held) answer(line string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := strings.Fields(line)
	n := 0
	if len(f) == 2 {
		var err error
		if n, err = strconv.Atoi(f[1]); err != nil || n < 0 || n > pages {
			return "bad number"
		}
	}
	switch {
	case len(f) == 1 && f[0] == "count":
		h.count++
		return strconv.Itoa(h.count)
	case len(f) == 1 && f[0] == "verify":
		return h.verify()
	case len(f) == 2 && f[0] == "write":
		for page := range n {
			h.fill(page, h.gen[page]+1)
		}
		return "ok"
	case len(f) == 2 && f[0] == "churn":
		return churn(n << 20)
	case len(f) == 1 && f[0] == "total":
		return total()
	}
	return "bad command"
}

func churn(size int) string {
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS)
	if err != nil {
		return err.Error()
	}
	for i := range b {
		b[i] = byte(i) | 1
	}
	if err := syscall.Munmap(b); err != nil {
		return err.Error()
	}
	return "ok"
}

func total() string {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemTotal:" {
			return f[1]
		}
	}
	return "no MemTotal"
}

func (h *held) serve(c net.Conn) {
	defer c.Close()
	s := bufio.NewScanner(c)
	for s.Scan() {
		if _, err := fmt.Fprintln(c, h.answer(s.Text())); err != nil {
			return
		}
	}
}

func (h *held) serveUDP(c net.PacketConn) {
	b := make([]byte, 512)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			log.Fatal(err)
		}
		if _, err := c.WriteTo([]byte(h.answer(string(b[:n]))), from); err != nil {
			log.Print(err)
		}
	}
}

func main() {
	if len(os.Args) > 1 {
		if err := ask(os.Args[1]); err != nil {
			log.Fatal(err)
		}
		return
	}
	h := &held{mem: make([]byte, pages*pageSize), gen: make([]uint32, pages)}
	for page := range pages {
		h.fill(page, 1)
	}
	udp, err := net.ListenPacket("udp4", ":80")
	if err != nil {
		log.Fatal(err)
	}
	go h.serveUDP(udp)
	l, err := net.Listen("tcp4", ":80")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("serving")
	for {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go h.serve(c)
	}
}

// ask has the other probe in this guest answer a line.
func ask(line string) error {
	c, err := net.Dial("tcp4", "127.0.0.1:80")
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	_, err = fmt.Print(answer)
	return err
}
