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

// touch is one line of a recording: the first access to a page.
type touch struct {
	page  uint32
	write bool
	// zero tells that the snapshot has zeros there.
	zero bool
}

// blockPages is 2 MiB: parts of a recorded guest in which nothing was touched are
// left out in such units, so that neighbours stay neighbours.
const blockPages = 512

// parseOrder reads a recording: a line for each touch, in order, such as "4711 r" or
// "4712 w zero"; lines that begin with # are for people.
func parseOrder(r io.Reader) ([]touch, error) {
	var all []touch
	seen := map[uint32]bool{}
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		t, err := parseTouch(line)
		if err != nil {
			return nil, fmt.Errorf("line %d of a recorded order: %w", n, err)
		}
		if seen[t.page] {
			return nil, fmt.Errorf("line %d of a recorded order: page %d comes again", n, t.page)
		}
		seen[t.page] = true
		all = append(all, t)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read recorded order: %w", err)
	}
	if len(all) == 0 {
		return nil, errors.New("read recorded order: nothing was touched")
	}
	return all, nil
}

func parseTouch(line string) (t touch, err error) {
	f := strings.Split(line, " ")
	if len(f) < 2 || len(f) > 3 || f[1] != "r" && f[1] != "w" || len(f) == 3 && f[2] != "zero" {
		return t, fmt.Errorf("%q is not a page, r or w, and perhaps zero", line)
	}
	page, err := strconv.ParseUint(f[0], 10, 24)
	if err != nil {
		return t, err
	}
	return touch{page: uint32(page), write: f[1] == "w", zero: len(f) == 3}, nil
}

func (t touch) String() string {
	s := fmt.Sprintf("%d %s", t.page, map[bool]string{false: "r", true: "w"}[t.write])
	if t.zero {
		s += " zero"
	}
	return s
}

// recorded makes a memory file like that of the recorded guest, and its order.
func recorded(dir string, recording []byte) (*order, error) {
	touches, err := parseOrder(bytes.NewReader(recording))
	if err != nil {
		return nil, err
	}
	var blocks []uint32
	for _, t := range touches {
		blocks = append(blocks, t.page/blockPages)
	}
	slices.Sort(blocks)
	blocks = slices.Compact(blocks)
	o := &order{name: "nginx's"}
	holes := map[uint32]bool{}
	for _, t := range touches {
		block, _ := slices.BinarySearch(blocks, t.page/blockPages)
		p := uint32(block*blockPages) + t.page%blockPages
		o.list, o.writes = append(o.list, p), append(o.writes, t.write)
		if t.zero {
			holes[p] = true
		}
	}
	o.memory, err = newMemory(dir, "nginx.mem", len(blocks)*blockPages, holes)
	return o, err
}
