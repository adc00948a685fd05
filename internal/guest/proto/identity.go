package proto

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Identity is what makes a clone differ from its golden VM. It travels in a form
// that takes the guest a few instructions to read.
type Identity struct {
	// Hostname is set as the kernel's, in /etc/hostname and in /etc/hosts; empty
	// leaves it.
	Hostname string
	// MachineID is 32 lower-case hexadecimal digits (machine-id(5)), or empty.
	MachineID string
	// Entropy is mixed into the kernel's random number generator, credited as
	// 8 bits a byte; 32 to 512 bytes, or none.
	Entropy []byte
	// Wall is the time that the guest's clock is set to, unless zero.
	Wall time.Time
}

// MaxEntropy bounds [Identity].Entropy, in bytes: more than the kernel's generator
// holds.
const MaxEntropy = 512

// AppendBinary appends the form for the wire: the time in nanoseconds since 1970,
// 0 for none, then each of the others behind its length in two bytes; big-endian.
func (id Identity) AppendBinary(b []byte) ([]byte, error) {
	if len(id.Hostname) > 64 || len(id.MachineID) > 64 || len(id.Entropy) > MaxEntropy {
		return nil, fmt.Errorf("encode identity: host name %q, machine id %q or %d bytes of entropy is too long", id.Hostname, id.MachineID, len(id.Entropy))
	}
	var wall int64
	if !id.Wall.IsZero() {
		wall = id.Wall.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(wall))
	for _, part := range []string{id.Hostname, id.MachineID, string(id.Entropy)} {
		b = binary.BigEndian.AppendUint16(b, uint16(len(part)))
		b = append(b, part...)
	}
	return b, nil
}

// ParseIdentity reads what [Identity.AppendBinary] wrote. Entropy is a part of b.
func ParseIdentity(b []byte) (Identity, error) {
	if len(b) < 8 {
		return Identity{}, fmt.Errorf("identity: %w", ErrMalformed)
	}
	var id Identity
	if wall := int64(binary.BigEndian.Uint64(b)); wall != 0 {
		id.Wall = time.Unix(0, wall)
	}
	b = b[8:]
	var parts [3][]byte
	for i := range parts {
		if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
			return Identity{}, fmt.Errorf("identity: %w", ErrMalformed)
		}
		n := 2 + int(binary.BigEndian.Uint16(b))
		parts[i], b = b[2:n], b[n:]
	}
	if len(b) != 0 || len(parts[2]) > MaxEntropy {
		return Identity{}, fmt.Errorf("identity: %w", ErrMalformed)
	}
	id.Hostname, id.MachineID, id.Entropy = string(parts[0]), string(parts[1]), parts[2]
	return id, nil
}
