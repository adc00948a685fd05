//go:build linux

package pageserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// ledger is what must not be forgotten of a session when the page server dies:
// which pages the guest gave back, the events that were read and perhaps not yet
// applied, and the counters. It is a memfd that the supervisor keeps as well.
//
// Applying an event twice does no harm, because a page that was given back is
// zeros for ever. So a successor applies what it finds in the events' buffer, and
// none is lost at whatever instruction its predecessor was killed
// (TestKilledAnywhere). Faults need no such care: they are delivered again.
type ledger struct {
	file  *os.File
	mem   []byte
	pages int64
	// any is false as long as nothing was given back, which is most of a clone's life.
	any bool
}

// The memory of a ledger: a header with the magic number, the number of pages and
// the counters, all little-endian 64-bit integers; the events' buffer; from ledgerBitmap on
// a bit for each page that was given back.
const (
	ledgerMagic    = 0x31_67_64_65_6c_76_63_66 // "fcvledg1"
	ledgerPages    = 8
	ledgerCounters = 16
	ledgerEvents   = 1024
	ledgerBitmap   = 4096
)

var errLedger = errors.New("not a session's ledger")

func ledgerSize(pages int64) int64 { return ledgerBitmap + (pages+63)/64*8 }

// newLedgerFile makes the memory of a ledger. It cannot change its size, so that
// who maps it need not fear SIGBUS.
func newLedgerFile(pages int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("fcvm-ledger", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make ledger: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ledger")
	err = f.Truncate(ledgerSize(pages))
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err == nil {
		var header [ledgerCounters]byte
		binary.LittleEndian.PutUint64(header[:], ledgerMagic)
		binary.LittleEndian.PutUint64(header[ledgerPages:], uint64(pages))
		_, err = f.WriteAt(header[:], 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make ledger: %w", err)
	}
	return f, nil
}

// openLedger maps a ledger, and owns file from then on, also when it fails.
func openLedger(file *os.File, pages int64) (_ *ledger, err error) {
	l := &ledger{file: file, pages: pages}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	fi, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	seals, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 || fi.Size() != ledgerSize(pages) {
		return nil, fmt.Errorf("open ledger of %d bytes for %d pages: %w", fi.Size(), pages, errLedger)
	}
	l.mem, err = unix.Mmap(int(file.Fd()), 0, int(fi.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map ledger: %w", err)
	}
	// The kernel must be able to write an event there whatever happens: a page
	// that would have to be brought in first could fail for who is being killed.
	if err := unix.Mlock(l.mem[:ledgerBitmap]); err != nil {
		return nil, fmt.Errorf("lock a session's ledger in memory: %w; raise the limit (ulimit -l)", err)
	}
	if binary.LittleEndian.Uint64(l.mem) != ledgerMagic || binary.LittleEndian.Uint64(l.mem[ledgerPages:]) != uint64(pages) {
		return nil, fmt.Errorf("open ledger for %d pages: %w", pages, errLedger)
	}
	for at := ledgerBitmap; at < len(l.mem) && !l.any; at += 8 {
		l.any = binary.LittleEndian.Uint64(l.mem[at:]) != 0
	}
	return l, nil
}

func (l *ledger) close() {
	if l.mem != nil {
		_ = unix.Munmap(l.mem)
		l.mem = nil
	}
	l.file.Close()
}

// events is the memory of a [uffd.Buffer].
func (l *ledger) events() []byte { return l.mem[ledgerEvents : ledgerEvents+uffd.BufferSize] }

// remove notes that n pages were given back.
func (l *ledger) remove(first, n int64) {
	for p := first; p < first+n; p++ {
		l.mem[ledgerBitmap+p/8] |= 1 << (p % 8)
	}
	l.any = l.any || n > 0
}

// removed tells whether a page was given back.
func (l *ledger) removed(page int64) bool {
	return l.any && l.mem[ledgerBitmap+page/8]>>(page%8)&1 != 0
}

// removedPages counts them.
func (l *ledger) removedPages() (n int64) {
	for at := ledgerBitmap; at < len(l.mem); at += 8 {
		n += int64(bits.OnesCount64(binary.LittleEndian.Uint64(l.mem[at:])))
	}
	return n
}

// save stores the counters, and load reads them back, so that they go on counting
// under a successor.
func (l *ledger) save(c *counters) {
	for i, p := range c.fields() {
		binary.LittleEndian.PutUint64(l.mem[ledgerCounters+8*i:], *p)
	}
}

func (l *ledger) load(c *counters) {
	for i, p := range c.fields() {
		*p = binary.LittleEndian.Uint64(l.mem[ledgerCounters+8*i:])
	}
}
