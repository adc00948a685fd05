//go:build linux

package pstest

import (
	"fmt"
	"strings"
)

// maxWrong is how many complaints are kept of one operation, and told of one script.
const maxWrong = 5

func (o *Outcome) complain(format string, args ...any) {
	if len(o.Wrong) < maxWrong {
		o.Wrong = append(o.Wrong, fmt.Sprintf(format, args...))
	}
}

// check compares a page with each content that it may have.
func (o *Outcome) check(page []byte, number int, e Expect) {
	// What the page looks like now; it may become something else meanwhile, which
	// no comparison below takes for right.
	switch first := get(page, 0); {
	case first == 0 && (e.Zero || e.Snapshot && IsHole(number)) && !differs(page, 0, 0):
		o.Zero++
	case e.Snapshot && first == snapshotMark(number).first() && !IsHole(number) && snapshotMark(number).matches(page):
		o.Snapshot++
	case e.Version != 0 && mark{e.Clone, uint32(number), e.Version}.matches(page):
		o.Own++
	default:
		o.complain("page %d holds %s, want %s", number, describePage(page), e.describe(number))
	}
}

// checkWord is check for a page whose first word was written alone.
func (o *Outcome) checkWord(page []byte, number int, e Expect) {
	var first, by uint64
	switch second := get(page, 1); {
	case e.Snapshot && !IsHole(number) && second != 0, e.Snapshot && !IsHole(number) && !e.Zero:
		first, by = snapshotMark(number).first(), step
	}
	w := get(page, 0)
	written := w == mark{e.Clone, uint32(number), e.Version}.first()
	if differs(page[8:], first+by, by) || !written && (!e.Maybe || w != first) {
		o.complain("page %d holds %s, want %s but for the first word", number, describePage(page), e.describe(number))
		return
	}
	o.Own++
}

func (e Expect) describe(number int) string {
	s := ""
	add := func(what string) {
		if s != "" {
			s += " or "
		}
		s += what
	}
	if e.Snapshot {
		if IsHole(number) {
			add("the snapshot's zeros")
		} else {
			add("the snapshot's page")
		}
	}
	if e.Zero {
		add("zeros")
	}
	if e.Version != 0 {
		add(describeMark(mark{e.Clone, uint32(number), e.Version}))
	}
	return s
}

// describePage tells runs of words and where they come from.
func describePage(page []byte) string {
	const most = 4
	var runs []string
	for from := 0; from < len(page)/8; {
		whose := originOf(get(page, from), from)
		to := from + 1
		for to < len(page)/8 && originOf(get(page, to), to) == whose {
			to++
		}
		switch {
		case to-from == len(page)/8:
			return whose.String()
		case len(runs) == most:
			return strings.Join(runs, ", ") + ", …"
		}
		runs = append(runs, fmt.Sprintf("%s in words %d to %d", whose, from, to-1))
		from = to
	}
	return strings.Join(runs, ", ")
}

func describeWord(w uint64, i int) string { return originOf(w, i).String() }

// origin of a word: zeros, a mark, or garbage.
type origin struct {
	mark    mark
	garbage uint64
}

func originOf(w uint64, i int) origin {
	if w == 0 {
		return origin{}
	}
	m := markOf(w, i)
	// Every word could be somebody's. What nobody comes near in practice is not believed.
	if m.clone == 0 && m.version != 1 || m.version > 1<<20 || m.page > 1<<20 {
		return origin{garbage: w}
	}
	return origin{mark: m}
}

func (o origin) String() string {
	switch {
	case o.garbage != 0:
		return fmt.Sprintf("garbage (%#x)", o.garbage)
	case o.mark == mark{}:
		return "zeros"
	default:
		return describeMark(o.mark)
	}
}

func describeMark(m mark) string {
	if m.clone == 0 {
		return fmt.Sprintf("page %d of the snapshot", m.page)
	}
	return fmt.Sprintf("page %d as clone %d wrote it (version %d)", m.page, m.clone, m.version)
}
