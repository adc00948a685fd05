//go:build linux

package pageserver

import (
	"errors"
	"fmt"
	"iter"
	"slices"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
)

// kind is what a fault gets.
type kind int

const (
	kindZero  kind = iota // zeros: the snapshot has none other, or the guest gave the page back
	kindWake              // what the template has: the kernel maps it when the thread looks again
	kindOwn               // the content, as a page of the clone's own
	kindShare             // the template has to be filled first
)

// kind of a fault. The caller holds mu.
func (s *session) kind(f fault) kind {
	page := f.off / pageSize
	switch t := s.server.template; {
	case s.ledger.removed(page), s.server.source.zero.hasAll(page, int64(s.pageSize)/pageSize):
		return kindZero
	case t == nil, s.unmapped():
		return kindOwn
	case !t.filled.has(page):
		return kindShare
	case slices.Contains(s.woken[:], f.addr):
		return kindOwn
	default:
		return kindWake
	}
}

// answer answers faults: neighbours that get the same, with one ioctl. What the
// kernel does not take for now goes back into the queue, and what has to wait for
// the disk to slow.go. The caller holds mu.
func (s *session) answer(fs []fault) error {
	fs = byAddress(fs)
	for len(fs) > 0 {
		k := s.kind(fs[0])
		n := 1
		// Filling the template for one page does it for its neighbours.
		for k != kindShare && n < len(fs) && s.joins(fs[n-1], fs[n], k) {
			n++
		}
		part := fs[:n]
		fs = fs[n:]
		var err error
		switch k {
		case kindZero:
			if err = s.place(part, nil); err == nil {
				err = s.placeZerosAround(part[0])
			}
		case kindWake:
			err = s.wake(part)
		case kindOwn:
			s.returned += n
			err = s.own(part)
		case kindShare:
			err = s.share(part)
		}
		if errors.Is(err, errSlow) {
			s.slow = append(s.slow, part...)
			s.attendant.others.Add(int32(len(part)))
			s.server.slow.add(s)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// joins tells whether b may be answered together with a, which is of kind k.
func (s *session) joins(a, b fault, k kind) bool {
	return b.addr == a.addr+s.pageSize && b.off == a.off+int64(s.pageSize) && s.kind(b) == k &&
		(k != kindZero || b.write == a.write)
}

// own answers with pages of the clone's own, of what is in the page cache.
func (s *session) own(fs []fault) error {
	size := len(fs) * int(s.pageSize)
	if size > len(s.attendant.buf) { // huge pages
		return errSlow
	}
	buf := s.attendant.buf[:size]
	if err := s.server.source.readNow(buf, fs[0].off); err != nil {
		return err
	}
	return s.placeContent(fs, buf)
}

// placeContent places pages that were read: those that turn out to be zeros as
// such, which costs nothing until the guest writes there.
func (s *session) placeContent(fs []fault, data []byte) error {
	size := int(s.pageSize)
	zero := func(i int) bool {
		return s.ledger.removed(fs[i].off/pageSize) || s.server.source.isZero(fs[i].off/pageSize, data[i*size:(i+1)*size])
	}
	for i := 0; i < len(fs); {
		z, n := zero(i), 1
		for i+n < len(fs) && zero(i+n) == z && (!z || fs[i+n].write == fs[i].write) {
			n++
		}
		var content []byte
		if !z {
			content = data[i*size : (i+n)*size]
		}
		if err := s.place(fs[i:i+n], content); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// share fills the template around the page, also for a write: under KVM a guest's
// read that has to wait comes as one (async page faults, FOLL_WRITE), so that
// clones would share nothing otherwise. A write then gets a page of its own at
// once, and a read what the template has.
func (s *session) share(fs []fault) error {
	buf := <-s.server.fillers
	defer func() { s.server.fillers <- buf }()
	data, err := s.server.template.need(fs[0].off, buf, true)
	if err != nil && data != nil {
		// The template cannot grow (tmpfs or memory is full): the clone goes on with
		// a page of its own, as long as it gets one.
		s.server.warnOnce("template cannot be filled; clones get pages of their own", err)
		return s.placeContent(fs, data)
	}
	switch {
	case err != nil:
		return err
	case s.server.source.zero.has(fs[0].off / pageSize):
		return s.place(fs, nil)
	case fs[0].write && data != nil:
		return s.place(fs, data)
	default:
		return s.wake(fs)
	}
}

// unmapped tells that the VMM does not map the template, as faults come back that
// were answered by waking, and not just because two threads had the same one. It
// gets pages of its own.
func (s *session) unmapped() bool { return s.returned > 32 && 2*s.returned > int(s.counters.Woken) }

// With a page of zeros a clone gets the others in its block of 2 MiB, which one page table
// maps: the zero page costs nothing but the entries there, some 50 ns each, where a fault
// that comes here costs 10 to 50 µs. A write to one of them later is between the
// guest and the kernel. A block that is all in pieces gets not all of them.
const (
	zeroBlock = hugePageSize / pageSize
	zeroRuns  = 32
)

// zerosAround yields the runs of pages that are zeros, as zero tells, in the block of a
// page and in [lo, hi): what follows on the page, and then what is before it.
func zerosAround(page, lo, hi int64, zero func(page int64) bool) iter.Seq2[int64, int64] {
	block := page / zeroBlock * zeroBlock
	lo, hi = max(lo, block), min(hi, block+zeroBlock)
	return func(yield func(first, n int64) bool) {
		runs := 0
		for _, part := range [][2]int64{{page, hi}, {lo, page}} {
			for at := part[0]; at < part[1]; at++ {
				first := at
				for at < part[1] && zero(at) {
					at++
				}
				if at == first {
					continue
				}
				if runs++; runs > zeroRuns || !yield(first, at-first) {
					return
				}
			}
		}
	}
}

// placeZerosAround gives the clone the zeros around one that it asked for. What is there
// already, or cannot be placed now, is left alone.
func (s *session) placeZerosAround(f fault) error {
	r, ok := s.region(f.addr)
	if !ok || s.pageSize != pageSize {
		return nil
	}
	first, end := int64(r.Offset)/pageSize, int64(r.Offset+r.Size)/pageSize
	zero := func(page int64) bool { return s.ledger.removed(page) || s.server.source.zero.has(page) }
	for page, n := range zerosAround(f.off/pageSize, first, end, zero) {
		for n > 0 {
			placed, err := s.put(r.Addr+uint64(page-first)*pageSize, uint64(n)*pageSize, nil, false)
			switch {
			case errors.Is(err, uffd.ErrGone), errors.Is(err, uffd.ErrClosed):
				return errOver
			case errors.Is(err, uffd.ErrAgain) && placed == 0:
				return nil
			}
			skip := placed/pageSize + 1 // a page that is there
			page, n = page+skip, n-skip
		}
	}
	return nil
}

// wake lets threads find in the template what they wait for.
func (s *session) wake(fs []fault) error {
	if err := s.fd.Wake(fs[0].addr, uint64(len(fs))*s.pageSize); err != nil {
		return ended(err)
	}
	for _, f := range fs {
		s.woken[s.wokenNext] = f.addr
		s.wokenNext = (s.wokenNext + 1) % len(s.woken)
	}
	s.counters.Woken += uint64(len(fs))
	s.answered(fs)
	return nil
}

// answered counts. The caller holds mu, as for all of the above.
func (s *session) answered(fs []fault) {
	s.counters.Faults += uint64(len(fs))
	now := clock()
	for _, f := range fs {
		if f.write {
			s.counters.WriteFaults++
		}
		s.server.demand.add(now-f.since, 1)
	}
}

// place gives the kernel pages for faults on neighbours: data, or zeros where that
// is nil; all are writes then, or none. What it does not take for now it parks.
func (s *session) place(fs []fault, data []byte) error {
	for len(fs) > 0 {
		n, err := s.put(fs[0].addr, uint64(len(fs))*s.pageSize, data, fs[0].write)
		done := int(n) / int(s.pageSize)
		s.answered(fs[:done])
		fs = fs[done:]
		if data != nil {
			data = data[n:]
		}
		if len(fs) == 0 {
			return nil
		}
		switch {
		case err == nil, done > 0:
			// A call stops at a page that is there. The next says so.
		case errors.Is(err, uffd.ErrAgain):
			s.counters.Retries += uint64(len(fs))
			s.queue = append(s.queue, fs...)
			return nil
		case errors.Is(err, uffd.ErrExist), errors.Is(err, uffd.ErrNotRegistered):
			// Somebody else was faster, or the mapping is gone: either way the thread
			// that waits has to look again.
			s.counters.Present++
			if err := s.hugeIsThere(fs[0].addr); err != nil {
				return err
			}
			if err := s.fd.Wake(fs[0].addr, s.pageSize); err != nil {
				return ended(err)
			}
			s.answered(fs[:1])
			fs = fs[1:]
			if data != nil {
				data = data[s.pageSize:]
			}
		case errors.Is(err, unix.ENOMEM) && s.pageSize != pageSize:
			return errNoHugePage
		default:
			return ended(err)
		}
	}
	return nil
}

// mostPresent is how often in a row the kernel may say of a huge page that it is there: for
// each thread that waited for it, with some to spare.
const mostPresent = 256

// hugeIsThere takes note that the kernel says of a huge page that it is there. Where none is
// free it says the same (hugetlb_mfill_atomic_pte in mm/hugetlb.c, seen on Linux 6.18; 6.1 has
// ENOMEM), and the thread that waits would come back for ever. The caller holds mu.
func (s *session) hugeIsThere(addr uint64) error {
	if s.pageSize == pageSize {
		return nil
	}
	if s.present == nil {
		s.present = map[uint64]int{}
	}
	s.present[addr]++
	if s.present[addr] > mostPresent {
		return errNoHugePage
	}
	return nil
}

var errNoHugePage = errors.New("answer fault: no huge page of 2 MiB is free; raise vm.nr_hugepages, or run fewer VMs of huge pages")

// put places pages, and counts what it placed. The caller holds mu.
func (s *session) put(addr, size uint64, data []byte, write bool) (n int64, err error) {
	switch {
	case data != nil:
		n, err = s.fd.Copy(addr, data)
		s.counters.CopiedBytes += uint64(n)
	case write, s.pageSize != pageSize:
		// A write to the zero page would fault again, to be copied from it. Huge
		// pages have no zero page.
		n, err = s.fd.Copy(addr, zeros[:min(size, uint64(len(zeros)))])
		s.counters.CopiedBytes += uint64(n)
	default:
		n, err = s.fd.ZeroPage(addr, size)
		s.counters.ZeroBytes += uint64(n)
	}
	if n > 0 && s.present != nil {
		delete(s.present, addr)
	}
	return n, err
}

// ended tells the end of a VMM from a failure.
func ended(err error) error {
	if errors.Is(err, uffd.ErrGone) || errors.Is(err, uffd.ErrClosed) {
		return errOver
	}
	return fmt.Errorf("answer fault: %w", err)
}
