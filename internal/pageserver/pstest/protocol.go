//go:build linux

package pstest

import "time"

// A VMM reads requests from descriptor 0 and answers each on answerFD when it is
// done with it, encoded with encoding/gob: both ends are the same program. When
// descriptor 0 ends, it exits.
const (
	envVMM = "FCVM_PSTEST_VMM"

	answerFD   = 3
	templateFD = 4
)

// request has one of its fields set, besides the number that its answer has, too.
type request struct {
	Number     uint64
	Start      *Config
	Handshake  *Handshake
	AwaitClose bool
	Disconnect bool
	Script     *Script
}

type answer struct {
	Number uint64
	Err    string
	// Hung is what threads were doing that no longer do anything.
	Hung   []string
	Result *Result
	// Mappings that Start made, and the number of the userfaultfd on them.
	Mappings []mapping
	UFFD     int
}

// Handshake is what a VMM says to a page server. The zero value but for Socket
// is Firecracker's: all regions in the order of [Config.Regions], and the userfaultfd,
// in one message; for shape [Template] a pidfd as well.
type Handshake struct {
	Socket string
	// Descriptors that come with it; empty means those of the shape.
	Descriptors []Descriptor
	// Body replaces the JSON, unless empty.
	Body []byte
	// Silent sends nothing at all.
	Silent bool
	// Piece is how many bytes are sent at once, all when 0; Pause is between two
	// pieces. Descriptors come with the first, or with DescriptorsLast the last.
	Piece           int
	Pause           time.Duration
	DescriptorsLast bool
	// Close ends the connection afterwards; else the VMM keeps it until its end.
	Close bool
}

// Descriptor is a kind of file.
type Descriptor uint8

// What may come with a handshake.
const (
	// None is no descriptor.
	None Descriptor = iota + 1
	// UFFD is the VMM's userfaultfd.
	UFFD
	// Pidfd is of the VMM itself, and marks it as one that others attached to.
	Pidfd
	// Pipe is a descriptor that is neither.
	Pipe
)
