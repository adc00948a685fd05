package boot

import (
	"encoding/binary"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/proto"
)

// machine implements guestd.System on the real one. Its system calls are raw: none
// of them blocks, and Go's scheduler would start threads for those that may.
type machine struct {
	random int // of /dev/random
	// pool is for AddEntropy: to allocate it in a clone would cost more than to
	// seed the generator.
	pool [poolHead + proto.MaxEntropy]byte
}

func newMachine() (*machine, error) {
	fd, err := unix.Open("/dev/random", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/random: %w", err)
	}
	m := &machine{random: fd}
	m.pool[0], m.pool[len(m.pool)-1] = 1, 1 // its pages are there
	return m, nil
}

func (*machine) SetHostname(name string) error {
	return raw(unix.SYS_SETHOSTNAME, uintptr(unsafe.Pointer(unsafe.StringData(name))), uintptr(len(name)), 0)
}

func (*machine) SetClock(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	return raw(unix.SYS_CLOCK_SETTIME, unix.CLOCK_REALTIME, uintptr(unsafe.Pointer(&ts)), 0)
}

func (*machine) KillAll() { _ = unix.Kill(-1, unix.SIGKILL) } // ESRCH when there is none

// From include/uapi/linux/random.h. struct rand_pool_info is: bits, bytes, data.
const (
	poolHead      = 8
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// AddEntropy credits the seed, and reseeds the generator, which would otherwise
// go on with the golden VM's key for up to a minute (drivers/char/random.c).
func (m *machine) AddEntropy(seed []byte) error {
	if len(seed) > proto.MaxEntropy {
		return fmt.Errorf("add entropy: %d bytes are too many", len(seed))
	}
	binary.NativeEndian.PutUint32(m.pool[:], uint32(8*len(seed)))
	binary.NativeEndian.PutUint32(m.pool[4:], uint32(len(seed)))
	copy(m.pool[poolHead:], seed)
	if err := raw(unix.SYS_IOCTL, uintptr(m.random), rndAddEntropy, uintptr(unsafe.Pointer(&m.pool[0]))); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	if err := raw(unix.SYS_IOCTL, uintptr(m.random), rndReseedCRNG, 0); err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	return nil
}

// raw makes a system call whose pointers the caller converts in the call itself.
//
//go:uintptrescapes
func raw(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := unix.RawSyscall(trap, a1, a2, a3); errno != 0 {
		return errno
	}
	return nil
}
