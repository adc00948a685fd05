//go:build linux

package pstest

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"golang.org/x/sys/unix"
)

// HistoryConfig is what a random history is made from. The same one gives every
// thread the same operations in the same order; how the threads' operations
// fall together is the machine's to say.
type HistoryConfig struct {
	Seed uint64
	// Ops is how many operations each thread carries out.
	Ops int
}

// history is one thread's part in a random history, and its model of memory: what
// each page may hold, by what this thread knows. Whoever owns a page knows it
// whole. Of the others' pages a thread knows that they change in one direction only.
type history struct {
	*thread
	config *HistoryConfig
	o      *Outcome
	rnd    *rand.Rand
	layout layout
	// strict is memory in which what was given back is zeros, and nothing else.
	strict  bool
	version uint32
	pages   []pageModel
	trace   trace
	wrong   bool
}

// pageModel is what a thread knows of a page.
type pageModel struct {
	base base
	// version of the whole page, with baseOwn.
	version uint32
	// hot is the version of the page's hot word, when it was written alone since; else 0.
	hot uint32
	// seen is of others' pages, and of this thread's word of a contended page: the
	// last version seen there, or 1 for zeros that are not the snapshot's, or 0.
	seen uint32
}

// base is where the words of a page come from that were not written alone.
type base uint8

const (
	baseSnapshot base = iota
	baseZero
	baseOwn
	// baseOpen is a page that was given back and not looked at since, whose template
	// may show through.
	baseOpen
)

// firstVersion leaves room for what pageModel.seen says besides.
const firstVersion = 2

func (t *thread) history(c *HistoryConfig, o *Outcome) {
	h := &history{
		thread: t, config: c, o: o, rnd: rand.New(rand.NewPCG(c.Seed, uint64(t.number))),
		layout: newLayout(t.memory, len(t.threads), c.Seed), strict: t.strict, version: firstVersion,
		pages: make([]pageModel, len(t.memory.pages)),
	}
	for n := range c.Ops {
		t.step(n + 1)
		if t.stop.Load() {
			return
		}
		h.one(n)
		if h.wrong {
			t.stop.Store(true)
			return
		}
		o.Ops++
	}
}

// one carries out the n-th operation. Threads that are about equally far work on
// the same few pages.
func (h *history) one(n int) {
	l := &h.layout
	at := h.rnd.IntN(len(l.blocks))
	if h.rnd.IntN(4) > 0 {
		at = int(mix(h.config.Seed+uint64(n/64)) % uint64(len(l.blocks)))
	}
	b := l.blocks[at]
	p := b.first + h.rnd.IntN(b.count)
	h.page.Store(uint32(p))
	switch dice := h.rnd.IntN(100); l.owner[p] {
	case h.number:
		h.own(p, dice)
	case everybody:
		h.trace.add(n, "read", p)
		h.check(p, &pageModel{})
	case contended:
		h.contend(p, dice)
	default:
		h.trace.add(n, "look at", p)
		h.lookAt(p)
	}
}

// own works on a page that no other thread writes to.
func (h *history) own(p, dice int) {
	m, page := &h.pages[p], h.memory.pages[p]
	switch {
	case dice < 40:
		h.trace.add(h.o.Ops, "read", p)
		h.check(p, m)
		return
	case dice < 60:
		h.trace.add(h.o.Ops, "write a word of", p)
		m.hot = h.nextVersion()
		put(page, hotWord(p), mark{h.clone, uint32(p), m.hot}.word(hotWord(p)))
	case dice < 75:
		h.trace.add(h.o.Ops, "write", p)
		*m = pageModel{base: baseOwn, version: h.nextVersion()}
		mark{h.clone, uint32(p), m.version}.fill(page)
	default:
		first, count := h.layout.removable(p)
		if dice < 88 {
			first, count = h.layout.alone(p)
		}
		h.trace.add(h.o.Ops, "give back", first)
		if !h.remove(first, count) {
			return
		}
		for i := range count {
			h.pages[first+i] = pageModel{base: h.removedBase()}
		}
	}
	if dice%2 == 0 {
		h.check(p, m)
	}
}

func (h *history) removedBase() base {
	if h.strict {
		return baseZero
	}
	return baseOpen
}

func (h *history) remove(first, count int) bool {
	mem, err := h.memory.span(first, count)
	if err == nil {
		err = unix.Madvise(mem, unix.MADV_DONTNEED)
	}
	if err != nil {
		h.fail("pages %d to %d: give back: %v", first, first+count-1, err)
	}
	return err == nil
}

// nextVersion is told to the others before anything is written with it.
func (h *history) nextVersion() uint32 {
	v := h.version
	h.version++
	h.latest.Store(v)
	return v
}

// check compares a page with the model, from its first to its last word.
func (h *history) check(p int, m *pageModel) {
	page, hot := h.memory.pages[p], hotWord(p)
	if m.base == baseOpen {
		// Whatever shows first is what stays, until it is given back again.
		m.base = baseSnapshot
		if get(page, (hot+1)%words) == 0 {
			m.base = baseZero
		}
	}
	var first, by uint64
	switch {
	case m.base == baseOwn:
		first, by = mark{h.clone, uint32(p), m.version}.first(), step
	case m.base == baseSnapshot && !IsHole(p):
		first, by = snapshotMark(p).first(), step
	}
	wrong := differs(page[:8*hot], first, by) || differs(page[8*hot+8:], first+uint64(hot+1)*by, by)
	hotWant := first + uint64(hot)*by
	if m.hot != 0 {
		hotWant = mark{h.clone, uint32(p), m.hot}.word(hot)
	}
	if wrong || get(page, hot) != hotWant {
		h.fail("page %d holds %s, want %s", p, describePage(page), m.describe(h.clone, p))
	}
}

// lookAt reads from a page that another thread owns.
func (h *history) lookAt(p int) {
	page, m := h.memory.pages[p], &h.pages[p]
	owner := &h.threads[h.layout.owner[p]]
	h.believe(p, hotWord(p), get(page, hotWord(p)), owner.latest.Load, &m.seen)
	var any uint32
	i := h.rnd.IntN(words)
	h.believe(p, i, get(page, i), owner.latest.Load, &any)
}

// believe checks a word that somebody else may be writing. It is the snapshot's,
// zero, or of a version that its writer has reached (latest, asked for after the
// word was read). It never goes back to an older version, nor to the snapshot, unless a
// template shows through. seen is what was there before.
func (h *history) believe(p, i int, w uint64, latest func() uint32, seen *uint32) {
	switch {
	case w == 0:
		if !IsHole(p) {
			*seen = max(*seen, 1)
		}
		return
	case !IsHole(p) && w == snapshotMark(p).word(i):
		if *seen == 0 || !h.strict {
			return
		}
	default:
		m := markOf(w, i)
		if m.clone == h.clone && m.page == uint32(p) && m.version >= max(*seen, firstVersion) && m.version <= latest() {
			*seen = m.version
			return
		}
	}
	h.fail("page %d holds %s in word %d, and held %s before", p, describeWord(w, i), i, describeSeen(*seen))
}

// contend works on a page that all threads write to, each to a word of its own, and
// all give back.
func (h *history) contend(p, dice int) {
	page, m := h.memory.pages[p], &h.pages[p]
	slot := (hotWord(p) + 8*h.number) % words
	switch {
	case dice < 40:
		h.trace.add(h.o.Ops, "write a word of", p)
		m.seen = h.nextVersion()
		put(page, slot, mark{h.clone, uint32(p), m.seen}.word(slot))
	case dice < 60:
		h.trace.add(h.o.Ops, "give back", p)
		if !h.remove(h.layout.alone(p)) {
			return
		}
	default:
		h.trace.add(h.o.Ops, "read a word of", p)
	}
	// Nobody else writes here: it is the last version, or it was given back.
	h.believe(p, slot, get(page, slot), h.latest.Load, &m.seen)
	other := (slot + 8) % words
	w := get(page, other)
	if m := markOf(w, other); w != 0 && (IsHole(p) || w != snapshotMark(p).word(other)) && (m.clone != h.clone || m.page != uint32(p)) {
		h.fail("page %d holds %s in word %d", p, describeWord(w, other), other)
	}
}

func (h *history) fail(format string, args ...any) {
	if h.wrong {
		return
	}
	h.wrong = true
	h.o.complain("%s (operation %d of the history with seed %d; before it %s)",
		fmt.Sprintf(format, args...), h.o.Ops, h.config.Seed, &h.trace)
}

func (m *pageModel) describe(clone uint16, p int) string {
	e := Expect{Snapshot: m.base == baseSnapshot, Zero: m.base == baseZero}
	if m.base == baseOwn {
		e.Clone, e.Version = clone, m.version
	}
	s := e.describe(p)
	if m.hot != 0 {
		s += fmt.Sprintf(" with word %d of version %d", hotWord(p), m.hot)
	}
	return s
}

func describeSeen(seen uint32) string {
	switch seen {
	case 0:
		return "nothing but what the snapshot has"
	case 1:
		return "zeros"
	default:
		return fmt.Sprintf("version %d", seen)
	}
}

// words of a page.
const words = PageSize / 8

// hotWord is the one of a page that is written alone, and that others look at.
func hotWord(p int) int { return int(mix(uint64(p)) % words) }

// trace remembers a thread's last operations.
type trace struct {
	last [16]struct {
		n, page int
		what    string
	}
	n int
}

func (t *trace) add(n int, what string, page int) {
	e := &t.last[t.n%len(t.last)]
	e.n, e.what, e.page = n, what, page
	t.n++
}

func (t *trace) String() string {
	var s []string
	for i := max(0, t.n-len(t.last)); i < t.n; i++ {
		e := t.last[i%len(t.last)]
		s = append(s, fmt.Sprintf("%d: %s page %d", e.n, e.what, e.page))
	}
	return strings.Join(s, ", ")
}
