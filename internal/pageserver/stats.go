//go:build linux

package pageserver

import "time"

// Policy says where the pages of a clone come from.
type Policy string

// The policies. See the package comment.
const (
	PolicyCopy  Policy = "copy"
	PolicyShare Policy = "share"
)

// Stats is what a page server tells of itself. Counters count since the start of
// the process, those of sessions since the session's begin, whichever page server
// served it then.
type Stats struct {
	PID     int    `json:"pid"`
	Policy  Policy `json:"policy"`
	MemFile string `json:"mem_file"`
	// MemBytes is the size of the memory file.
	MemBytes int64 `json:"mem_bytes"`
	// TemplateBytes are in the template, shared by all clones that touch them.
	TemplateBytes int64 `json:"template_bytes"`
	// ReplayedBytes of them were filled from the working set, BackgroundBytes
	// by the background fill, and the rest by demand faults.
	ReplayedBytes   int64 `json:"replayed_bytes"`
	BackgroundBytes int64 `json:"background_bytes"`
	// Faults were answered since the start, also those of VMMs that have ended.
	Faults uint64 `json:"faults"`
	// Sessions are those of VMMs that run, by ascending pid.
	Sessions []SessionStats `json:"sessions"`
	// Ended is the number of sessions that are over, however they ended.
	Ended int `json:"ended"`
	// Failures are the last VMMs that were killed because a fault could not be
	// answered, oldest first, at most 64.
	Failures []Failure `json:"failures,omitempty"`
	// Refused is the number of connections that became no session.
	Refused int `json:"refused"`
	// WorkingSetPages is what is replayed for a new session.
	WorkingSetPages int64 `json:"working_set_pages"`
	// Demand is the time from reading a fault's event to its answer, Replay and
	// Background that of filling one window of the template, or of placing one run of pages, ahead.
	Demand     Histogram `json:"demand"`
	Replay     Histogram `json:"replay"`
	Background Histogram `json:"background"`
}

// SessionStats counts for one clone.
type SessionStats struct {
	// PID of the VMM.
	PID int `json:"pid"`
	// Started is when this page server began to serve it.
	Started time.Time `json:"started"`
	counters
	// RemovedPages is the number of pages that are zeros because the guest gave them
	// back at some time.
	RemovedPages int64 `json:"removed_pages"`
}

// counters are a session's. They are kept in its [ledger].
type counters struct {
	// Faults that were answered (demand), WriteFaults among them those of writes.
	Faults      uint64 `json:"faults"`
	WriteFaults uint64 `json:"write_faults"`
	// Slow faults among them had to wait for the disk.
	Slow uint64 `json:"slow"`
	// CopiedBytes were placed as pages of the clone's own (UFFDIO_COPY).
	CopiedBytes uint64 `json:"copied_bytes"`
	// ZeroBytes were mapped to the zero page (UFFDIO_ZEROPAGE).
	ZeroBytes uint64 `json:"zero_bytes"`
	// Woken faults were answered by the template alone.
	Woken uint64 `json:"woken"`
	// RemovedBytes were given back by the guest, each time it did.
	RemovedBytes uint64 `json:"removed_bytes"`
	// Retries are answers that the kernel did not take for now (EAGAIN), because
	// of a REMOVE.
	Retries uint64 `json:"retries"`
	// Present are answers that came too late, because the page was there already (EEXIST).
	Present uint64 `json:"present"`
	// ReplayedBytes were placed before the clone asked for them.
	ReplayedBytes uint64 `json:"replayed_bytes"`
	// Handovers is how often another page server took over.
	Handovers uint64 `json:"handovers"`
}

// fields are all counters in the order of the ledger, to which fields are only
// ever added at the end.
func (c *counters) fields() [11]*uint64 {
	return [...]*uint64{
		&c.Faults, &c.WriteFaults, &c.Slow, &c.CopiedBytes, &c.ZeroBytes, &c.Woken,
		&c.RemovedBytes, &c.Retries, &c.Present, &c.ReplayedBytes, &c.Handovers,
	}
}

// Failure is a VMM that was killed because a fault could not be answered.
type Failure struct {
	PID    int       `json:"pid"`
	Time   time.Time `json:"time"`
	Reason string    `json:"reason"`
}
