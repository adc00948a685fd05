//go:build linux

package main

import (
	"bufio"
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"fcvm/internal/pageserver/pstest"
)

// order is which pages clones touch, each once, and in which order.
type order struct {
	name   string
	memory *memory
	list   []uint32
	// writes tells which are written to; nil for none.
	writes []bool
	// set is the path of the working set of a clone that touched them; see workingSet.
	set string
}

// first returns an order of the first n pages.
func (o *order) first(n int) *order {
	short := *o
	n = min(n, len(o.list))
	short.list, short.writes = o.list[:n], o.writes[:min(n, len(o.writes))]
	return &short
}

// sum is that of the words that a clone has to read.
func (o *order) sum() (sum uint64) {
	for i, p := range o.list {
		if i >= len(o.writes) || !o.writes[i] {
			sum += o.memory.word(p)
		}
	}
	return sum
}

// access is the order as an operation of a VMM.
func (o *order) access(latencies bool) pstest.Op {
	return pstest.Op{Kind: pstest.Read, Pages: pstest.Pages{List: o.list}, Writes: o.writes, Latencies: latencies}
}

func sequential(m *memory, pages int) *order {
	o := &order{name: "sequential", memory: m}
	for p := range pages {
		o.list = append(o.list, uint32(p))
	}
	return o
}

func random(m *memory, pages int) *order {
	o := sequential(m, pages)
	o.name = "random"
	rnd := rand.New(rand.NewPCG(1, 2))
	rnd.Shuffle(len(o.list), func(i, j int) { o.list[i], o.list[j] = o.list[j], o.list[i] })
	return o
}

// nginxOrder is what a clone of nginx waited for; its head tells where it is from.
//
//go:embed testdata/nginx.order
var nginxOrder []byte

// touch is the first access to a page.
type touch struct {
	page  uint32
	write bool
}

// span is some pages in a row.
type span struct{ first, pages uint32 }

// recording is what a guest did, and what it met.
type recording struct {
	touches []touch
	// zeros are the pages of zeros in the blocks that it touched.
	zeros []span
}

// blockPages is 2 MiB: parts of a recorded guest in which nothing was touched are
// left out in such units, so that neighbours stay neighbours.
const blockPages = 512

// parseRecording reads one: a line for each touch, in order, such as "4711 r" or
// "4712 w", and for each run of pages of zeros, such as "4096 zeros 12"; lines that begin
// with # are for people.
func parseRecording(r io.Reader) (recording, error) {
	var all recording
	seen := map[uint32]bool{}
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		page, err := all.parseLine(line)
		if err != nil {
			return recording{}, fmt.Errorf("line %d of a recording: %w", n, err)
		}
		if k := len(all.touches); k > len(seen) {
			if seen[page] {
				return recording{}, fmt.Errorf("line %d of a recording: page %d comes again", n, page)
			}
			seen[page] = true
		}
	}
	if err := sc.Err(); err != nil {
		return recording{}, fmt.Errorf("read recording: %w", err)
	}
	if len(all.touches) == 0 {
		return recording{}, errors.New("read recording: nothing was touched")
	}
	return all, nil
}

// parseLine adds what a line says, and returns the page that it begins with.
func (r *recording) parseLine(line string) (uint32, error) {
	f := strings.Split(line, " ")
	first, err := strconv.ParseUint(f[0], 10, 24)
	switch {
	case err != nil:
		return 0, err
	case len(f) == 2 && (f[1] == "r" || f[1] == "w"):
		r.touches = append(r.touches, touch{page: uint32(first), write: f[1] == "w"})
	case len(f) == 3 && f[1] == "zeros":
		n, err := strconv.ParseUint(f[2], 10, 24)
		if err != nil {
			return 0, err
		}
		r.zeros = append(r.zeros, span{uint32(first), uint32(n)})
	default:
		return 0, fmt.Errorf("%q is neither a page and r or w, nor a page, zeros, and how many", line)
	}
	return uint32(first), nil
}

func (r recording) String() string {
	var b strings.Builder
	for _, t := range r.touches {
		fmt.Fprintf(&b, "%d %s\n", t.page, map[bool]string{false: "r", true: "w"}[t.write])
	}
	for _, z := range r.zeros {
		fmt.Fprintf(&b, "%d zeros %d\n", z.first, z.pages)
	}
	return b.String()
}

// blocks are the numbers of those that were touched, in order.
func (r recording) blocks() []uint32 {
	var blocks []uint32
	for _, t := range r.touches {
		blocks = append(blocks, t.page/blockPages)
	}
	slices.Sort(blocks)
	return slices.Compact(blocks)
}

// findZeros looks up what the touched blocks of a memory file have of zeros.
func (r *recording) findZeros(memory io.ReaderAt) error {
	page := make([]byte, pageSize)
	zeros := make([]byte, pageSize)
	for _, block := range r.blocks() {
		for i := range uint32(blockPages) {
			p := block*blockPages + i
			if _, err := memory.ReadAt(page, int64(p)*pageSize); err != nil {
				return fmt.Errorf("read page %d: %w", p, err)
			}
			if !bytes.Equal(page, zeros) {
				continue
			}
			if n := len(r.zeros); n > 0 && r.zeros[n-1].first+r.zeros[n-1].pages == p {
				r.zeros[n-1].pages++
			} else {
				r.zeros = append(r.zeros, span{p, 1})
			}
		}
	}
	return nil
}

// recorded makes a memory file like that of the recorded guest, and its order.
func recorded(dir string, text []byte) (*order, error) {
	r, err := parseRecording(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	blocks := r.blocks()
	moved := func(page uint32) (uint32, bool) {
		block, found := slices.BinarySearch(blocks, page/blockPages)
		return uint32(block*blockPages) + page%blockPages, found
	}
	o := &order{name: "nginx's"}
	for _, t := range r.touches {
		p, _ := moved(t.page)
		o.list, o.writes = append(o.list, p), append(o.writes, t.write)
	}
	holes := map[uint32]bool{}
	for _, z := range r.zeros {
		for i := range z.pages {
			if p, found := moved(z.first + i); found {
				holes[p] = true
			}
		}
	}
	o.memory, err = newMemory(dir, "nginx.mem", len(blocks)*blockPages, holes)
	return o, err
}
