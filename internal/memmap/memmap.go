// Package memmap draws guest memory as a picture: one square a page, coloured by
// what is known of that page, with a legend that counts. It knows neither VMs
// nor snapshots; who calls it says what each page is.
//
// Pages next to each other in memory are next to each other in the picture, see
// [Map.Picture]. Nothing here is kept after a call returns.
package memmap

import (
	"fmt"
)

// Page is what is known of one page of guest memory: one state, and
// [InWorkingSet] on top of it or not.
type Page uint8

// The states of a page. Those of a snapshot are Zero and Data; those of a VM
// are all but Data.
const (
	// Untouched pages are not in the VM's page tables: the guest has not asked for
	// them since it started, or has given them back.
	Untouched Page = iota
	// Zero pages read as zeros, and take no memory: the kernel's zero page in a VM,
	// holes and pages of zeros in a snapshot.
	Zero
	// Data are the snapshot's other pages.
	Data
	// Shared pages are mapped from the template or the memory file, where all
	// clones can map them.
	Shared
	// Private pages are the VM's own: written by it, or copied for it.
	Private
	states
)

// InWorkingSet is added to the state of pages that are in the working set of
// the snapshot.
const InWorkingSet Page = 0x80

// State is the page without InWorkingSet.
func (p Page) State() Page { return p &^ InWorkingSet }

// String names the state as tables and legends do.
func (p Page) String() string {
	switch p.State() {
	case Untouched:
		return "untouched"
	case Zero:
		return "zero"
	case Data:
		return "data"
	case Shared:
		return "shared"
	case Private:
		return "private"
	}
	return fmt.Sprintf("unknown (%d)", uint8(p))
}

// SnapshotStates are what can be seen in a snapshot, in the legend's order.
func SnapshotStates() []Page { return []Page{Data, Zero} }

// VMStates are what can be seen in a VM, in the legend's order.
func VMStates() []Page { return []Page{Shared, Private, Zero, Untouched} }

// Map is guest memory, page by page.
type Map struct {
	// Title heads the picture, such as "snapshot nginx-base".
	Title string
	// PageBytes is the size of a page.
	PageBytes int64
	// States that are counted, in the legend's order. No page has another.
	States []Page
	// WorkingSet tells that a working set is known, so that pages without
	// InWorkingSet are known to be outside.
	WorkingSet bool
	// Pages in the order of the guest's memory.
	Pages []Page
}

// Check returns an error when the map holds a page in a state that is not among
// States, or one in the working set where none is known. Maps that come from
// another process are checked before they are counted or drawn.
func (m *Map) Check() error {
	var known [256]bool
	for _, s := range m.States {
		if s >= states {
			return fmt.Errorf("check map of memory: no state is called %d", uint8(s))
		}
		known[s] = true
		known[s|InWorkingSet] = m.WorkingSet
	}
	for i, p := range m.Pages {
		if !known[p] {
			return fmt.Errorf("check map of memory: page %d is %#x, which is not expected here", i, uint8(p))
		}
	}
	if m.PageBytes <= 0 {
		return fmt.Errorf("check map of memory: pages of %d bytes", m.PageBytes)
	}
	return nil
}

// Bytes is the size of the guest's memory.
func (m *Map) Bytes() int64 { return int64(len(m.Pages)) * m.PageBytes }

// Count is how many pages are in one state.
type Count struct {
	State Page
	// Pages in this state, those in the working set among them.
	Pages, WorkingSet int64
}

// Counts returns a count for each of States, in their order.
func (m *Map) Counts() []Count {
	var n [256]int64
	for _, p := range m.Pages {
		n[p]++
	}
	counts := make([]Count, len(m.States))
	for i, s := range m.States {
		in := n[s|InWorkingSet]
		counts[i] = Count{State: s, Pages: n[s] + in, WorkingSet: in}
	}
	return counts
}
