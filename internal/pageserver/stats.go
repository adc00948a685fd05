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

// Stats is what a page server tells of itself.
type Stats struct {
	PID     int    `json:"pid"`
	Policy  Policy `json:"policy"`
	MemFile string `json:"mem_file"`
	// MemBytes is the size of the memory file.
	MemBytes int64 `json:"mem_bytes"`
	// TemplateBytes are in the template, shared by all clones that touch them.
	TemplateBytes int64 `json:"template_bytes"`
	// Faults were answered since the start, also those of VMMs that have ended.
	Faults uint64 `json:"faults"`
	// Sessions are those of VMMs that run.
	Sessions []SessionStats `json:"sessions"`
	// Ended is the number of sessions that are over, however they ended.
	Ended int `json:"ended"`
	// Failures are the last VMMs that were killed because a fault could not be
	// answered, oldest first, at most 64.
	Failures []Failure `json:"failures,omitempty"`
	// Refused is the number of connections that became no session.
	Refused int `json:"refused"`
}

// SessionStats counts for one clone.
type SessionStats struct {
	// PID of the VMM; 0 when it is not known.
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Faults that were answered, WriteFaults among them those of writes.
	Faults      uint64 `json:"faults"`
	WriteFaults uint64 `json:"write_faults"`
	// CopiedBytes were placed as pages of the clone's own (UFFDIO_COPY).
	CopiedBytes uint64 `json:"copied_bytes"`
	// ZeroBytes were mapped to the zero page (UFFDIO_ZEROPAGE).
	ZeroBytes uint64 `json:"zero_bytes"`
	// Woken faults were answered by the template alone.
	Woken uint64 `json:"woken"`
	// RemovedBytes were given back by the guest.
	RemovedBytes uint64 `json:"removed_bytes"`
	// Retries are answers that had to wait for a REMOVE.
	Retries uint64 `json:"retries"`
}

// Failure is a VMM that was killed because a fault could not be answered.
type Failure struct {
	PID    int       `json:"pid"`
	Time   time.Time `json:"time"`
	Reason string    `json:"reason"`
}
