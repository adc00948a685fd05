//go:build linux

package pstest

import (
	"encoding/binary"
	"fmt"
)

// maxWrong is how many complaints are kept of one operation.
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
	switch first := binary.NativeEndian.Uint64(page); {
	case first == 0 && (e.Zero || e.Snapshot && IsHole(number)) && allZero(page) < 0:
		o.Zero++
	case e.Snapshot && first == snapshotMark(number).first() && !IsHole(number) && snapshotMark(number).matches(page) < 0:
		o.Snapshot++
	case e.Version != 0 && mark{e.Clone, uint32(number), e.Version}.matches(page) < 0:
		o.Own++
	default:
		o.complain("page %d holds %s, want %s", number, describePage(page), e.describe(number))
	}
}

// allZero returns the first word that is not, or -1.
func allZero(page []byte) int {
	for i := 0; i < len(page); i += 8 {
		if binary.NativeEndian.Uint64(page[i:]) != 0 {
			return i / 8
		}
	}
	return -1
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
	s, from := "", 0
	word := func(i int) uint64 { return binary.NativeEndian.Uint64(page[8*i:]) }
	name := func(i int) string { return describeWord(word(i), i) }
	words := len(page) / 8
	runs := 0
	for i := 1; i <= words; i++ {
		if i < words && name(i) == name(from) {
			continue
		}
		if runs++; runs > 4 {
			return s + ", …"
		}
		if s != "" {
			s += ", "
		}
		if from == 0 && i == words {
			return name(from)
		}
		s += fmt.Sprintf("%s in words %d to %d", name(from), from, i-1)
		from = i
	}
	return s
}

func describeWord(w uint64, i int) string {
	if w == 0 {
		return "zeros"
	}
	m := markOf(w, i)
	// Every word could be somebody's. What nobody comes near in practice is not believed.
	if m.clone == 0 && m.version != 1 || m.version > 1<<20 || m.page > 1<<20 {
		return fmt.Sprintf("garbage (%#x)", w)
	}
	return describeMark(m)
}

func describeMark(m mark) string {
	if m.clone == 0 {
		return fmt.Sprintf("page %d of the snapshot", m.page)
	}
	return fmt.Sprintf("page %d as clone %d wrote it (version %d)", m.page, m.clone, m.version)
}
