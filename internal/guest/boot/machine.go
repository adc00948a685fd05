package boot

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// machine implements guestd.System on the real one.
type machine struct{}

func (machine) SetHostname(name string) error { return unix.Sethostname([]byte(name)) }

func (machine) SetClock(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

func (machine) KillAll() { _ = unix.Kill(-1, unix.SIGKILL) } // ESRCH when there is none

// From include/uapi/linux/random.h.
const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// AddEntropy credits the seed, and reseeds the generator, which would otherwise
// go on with the golden VM's key for up to a minute (drivers/char/random.c).
func (machine) AddEntropy(seed []byte) error {
	f, err := os.OpenFile("/dev/random", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info: bits, bytes, data.
	b := binary.NativeEndian.AppendUint32(nil, uint32(8*len(seed)))
	b = binary.NativeEndian.AppendUint32(b, uint32(len(seed)))
	b = append(b, seed...)
	if err := ioctl(f, rndAddEntropy, unsafe.Pointer(&b[0])); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	runtime.KeepAlive(b)
	if err := ioctl(f, rndReseedCRNG, nil); err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	return nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}
