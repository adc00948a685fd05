//go:build linux

package pstest

import (
	"fmt"
	"time"
)

// Script is what the threads of a VMM do, each its own list of operations, in
// order. Threads start together.
type Script struct {
	Threads [][]Op
	// Patience is how long an access may take, or all threads do nothing, before the
	// script is given up as hung; 30 s when 0. It is for what would hang else, and no
	// measure of speed.
	Patience time.Duration
}

// Kind of an operation.
type Kind uint8

// The operations. Pages are those of [Op.Pages], in units of [PageSize] also where
// the VMM's pages are larger, numbered by their place in the memory file.
const (
	// Read reads a word of each page.
	Read Kind = iota + 1
	// Write writes a word of each page, at its start.
	Write
	// Fill writes each page whole with the pattern of Version.
	Fill
	// Check reads each page whole and compares it with Expect.
	Check
	// CheckWord is Check of a page whose first word Write wrote, Version by clone
	// Clone; the other words are as the rest of Expect says. With Maybe the first word may
	// be like the others as well.
	CheckWord
	// Sum reads each page whole, and returns the sum of all words.
	Sum
	// Remove gives each page back (MADV_DONTNEED), as many in one call as follow each other;
	// with Others all of them again and again, until those threads are through.
	Remove
	// Unmap takes the pages out of the VMM's memory (munmap).
	Unmap
	// Barrier waits for all threads of the script.
	Barrier
	// Sleep waits for Wait.
	Sleep
	// Connect shakes hands, as [VMM.Connect] does: by then others may wait already.
	Connect
	// AwaitAsleep waits until each thread of Others sleeps in the operation whose number
	// stands in Steps, in a fault say, or is through with it.
	AwaitAsleep
	// Freeze stops process PID (SIGSTOP), a page server, and returns when it has
	// stopped; Thaw lets it go on.
	Freeze
	Thaw
	// Exit ends the VMM at once with exit code 7, whatever other threads do.
	Exit
	// Die kills it.
	Die
	// History carries out a random history, in all threads of the script at once.
	History
)

var kindNames = [...]string{
	Read: "read", Write: "write", Fill: "fill", Check: "check", CheckWord: "check word", Sum: "sum", Remove: "remove", Unmap: "unmap",
	Barrier: "barrier", Sleep: "sleep", Connect: "connect", AwaitAsleep: "await asleep", Freeze: "freeze", Thaw: "thaw", Exit: "exit", Die: "die", History: "history",
}

func (k Kind) String() string {
	if int(k) < len(kindNames) && kindNames[k] != "" {
		return kindNames[k]
	}
	return fmt.Sprintf("operation %d", uint8(k))
}

// accesses tells whether it may have to wait for the page server, and for nobody else.
func (k Kind) accesses() bool {
	switch k {
	case Read, Write, Fill, Check, CheckWord, Sum, Remove, Unmap, History:
		return true
	default:
		return false
	}
}

// Op is one operation of a thread.
type Op struct {
	Kind  Kind
	Pages Pages
	// Expect is what Check allows.
	Expect Expect
	// Version that Fill writes, at least 1.
	Version uint32
	// Writes tells which of Pages a Read writes to instead, as guests do both by
	// turns; those behind its end are read.
	Writes []bool
	// Latencies asks Read and Write to measure each access.
	Latencies bool
	// Wait of Sleep; or Until, by [Clock], as VMMs wait that are to
	// begin together.
	Wait, Until time.Duration
	// Others are the numbers of threads, for AwaitAsleep and Remove, and Steps those of an
	// operation of each, for AwaitAsleep.
	Others, Steps []int
	// PID for Freeze and Thaw.
	PID int
	// Handshake of Connect.
	Handshake *Handshake
	// History of History.
	History *HistoryConfig
}

// Pages are some pages in some order.
type Pages struct {
	// First page and how many; with List empty.
	First, Count int
	// Shuffle other than 0 is the seed of the order; 0 is ascending.
	Shuffle uint64
	// List are the pages in the order that they are to be taken in.
	List []uint32
}

// Page is one.
func Page(n int) Pages { return Pages{First: n, Count: 1} }

// Range is count pages from first on, ascending.
func Range(first, count int) Pages { return Pages{First: first, Count: count} }

// Expect is what a page may hold.
type Expect struct {
	// Snapshot allows what the snapshot has, Zero zeros, and Clone with Version what
	// that clone wrote ([Config.Clone], [Op.Version]). A page is one of these from its
	// first to its last word.
	Snapshot, Zero bool
	Clone          uint16
	Version        uint32
	// Maybe is for CheckWord.
	Maybe bool
}

// Result of a script: one for each thread and operation.
type Result struct {
	Threads [][]Outcome
}

// Outcome of an operation.
type Outcome struct {
	// Began is when it did, by [Clock], and Elapsed how long it took, as a whole.
	Began, Elapsed time.Duration
	// Latencies of each access in nanoseconds, in order.
	Latencies []uint32
	// Sum of Sum, or of the words that Read read.
	Sum uint64
	// Snapshot, Zero and Own count the pages that Check found to be so. A page of
	// zeros in the snapshot counts as zero.
	Snapshot, Zero, Own int
	// Ops of a history that were carried out.
	Ops int
	// Wrong describes pages that Check did not expect, the first few.
	Wrong []string
}

// Wrong returns what the checks of a script complain about, the first few.
func (r *Result) Wrong() (wrong []string) {
	for i, thread := range r.Threads {
		for _, o := range thread {
			for _, w := range o.Wrong {
				if len(wrong) < maxWrong {
					wrong = append(wrong, fmt.Sprintf("thread %d: %s", i, w))
				}
			}
		}
	}
	return wrong
}
