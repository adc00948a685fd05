// Memtest holds guest memory honest. It fills memory with a pattern in which
// every 8 bytes tell their own place, and over HTTP verifies it, and rewrites a
// part of it with a pattern of another seed:
//
//	GET /verify?seed=S&from=F&pages=N    pages F..F+N must have seed S, all others seed 0
//	GET /rewrite?seed=S&from=F&pages=N
//
// Beside that it takes memory and gives it back, so that the guest's kernel reports
// it free to the host, and tells how long the guest stood still:
//
//	GET /churn?pages=N                   fills N new pages, checks them, and lets them go
//	GET /pause                           the longest time since the last call that
//	                                     nothing ran, in milliseconds
package main

import (
	"encoding/binary"
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const page = 4096

type memory struct {
	mu   sync.Mutex
	data []byte
}

// word is what stands at offset off under seed: never zero, and different for
// any two of the offsets and seeds in use.
func word(seed uint64, off int) uint64 {
	x := (uint64(off)/8+1)*0x9e3779b97f4a7c15 ^ (seed+1)*0xd1342543de82ef95
	x ^= x >> 29
	return x*0xbf58476d1ce4e5b9 | 1
}

func (m *memory) fill(seed uint64, from, to int) {
	for off := from; off < to; off += 8 {
		binary.LittleEndian.PutUint64(m.data[off:], word(seed, off))
	}
}

func (m *memory) check(seed uint64, from, to int) error {
	for off := from; off < to; off += 8 {
		if got, want := binary.LittleEndian.Uint64(m.data[off:]), word(seed, off); got != want {
			return fmt.Errorf("page %d offset %d: got %#x, want %#x (seed %d)", off/page, off%page, got, want, seed)
		}
	}
	return nil
}

func number(r *http.Request, key string) int {
	n, _ := strconv.Atoi(r.FormValue(key))
	return n
}

func (m *memory) serve(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	seed := uint64(number(r, "seed"))
	from := number(r, "from") * page
	to := from + number(r, "pages")*page
	if from < 0 || to < from || to > len(m.data) {
		http.Error(w, "outside memory", http.StatusBadRequest)
		return
	}
	if r.URL.Path == "/rewrite" {
		m.fill(seed, from, to)
		fmt.Fprintf(w, "rewrote %d pages\n", (to-from)/page)
		return
	}
	for _, err := range []error{m.check(0, 0, from), m.check(seed, from, to), m.check(0, to, len(m.data))} {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	fmt.Fprintf(w, "verified %d pages\n", len(m.data)/page)
}

// churn uses memory that nobody had before.
func churn(w http.ResponseWriter, r *http.Request) {
	size := number(r, "pages") * page
	data, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	m := &memory{data: data}
	for off := 0; off < size; off += page {
		for _, b := range data[off : off+page] {
			if b != 0 {
				http.Error(w, fmt.Sprintf("new page %d is not zeros", off/page), http.StatusInternalServerError)
				return
			}
		}
	}
	m.fill(9, 0, size)
	err = m.check(9, 0, size)
	if err == nil {
		err = syscall.Munmap(data)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "churned %d pages\n", size/page)
}

// standstill measures how long the guest does nothing.
type standstill struct{ longest atomic.Int64 }

var stand standstill

func (s *standstill) watch() {
	const tick = 2 * time.Millisecond
	for last := time.Now(); ; {
		time.Sleep(tick)
		now := time.Now()
		if gap := now.Sub(last).Milliseconds(); gap > s.longest.Load() {
			s.longest.Store(gap)
		}
		last = now
	}
}

func main() {
	mib := 64
	if len(os.Args) > 1 {
		mib, _ = strconv.Atoi(os.Args[1])
	}
	m := &memory{data: make([]byte, mib<<20)}
	m.fill(0, 0, len(m.data))
	go stand.watch()
	http.HandleFunc("/verify", m.serve)
	http.HandleFunc("/churn", churn)
	http.HandleFunc("/pause", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, stand.longest.Swap(0)) })
	http.HandleFunc("/rewrite", m.serve)
	fmt.Printf("filled %d MiB\n", mib)
	log.Fatal(http.ListenAndServe(":8080", nil))
}
