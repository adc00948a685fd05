//go:build linux

package pstest

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm/hugepages"
)

func hugePages(l *lab) error {
	const pages, clones, threads = 6, 2, 4
	release, err := ReserveHugePages(pages * clones)
	if err != nil {
		return err
	}
	defer release()
	const small = HugePageSize / PageSize
	if err := l.start(pages * small); err != nil {
		return err
	}
	for range clones {
		v, err := l.vmm(Config{PageSize: HugePageSize, Threads: threads, Regions: []Region{
			{Offset: 2 * HugePageSize, Size: 4 * HugePageSize, Slot: 1}, {Size: 2 * HugePageSize},
		}})
		if err != nil {
			return err
		}
		if err := v.Connect(Handshake{Socket: l.server.Socket}); err != nil {
			return err
		}
	}
	err = together(l.vmms, func(_ int, v *VMM) error {
		own := Expect{Clone: v.config.Clone, Version: 2}
		snapshot := Expect{Snapshot: true}
		at := func(n int) Pages { return Range(n*small, small) }
		return l.do(v,
			// All on the same page, then each on its own.
			[]Op{
				{Kind: Check, Pages: Page(5), Expect: snapshot}, {Kind: Barrier},
				{Kind: Check, Pages: Range(7, 3*small-7), Expect: snapshot},
			},
			[]Op{
				{Kind: Fill, Pages: Page(6), Version: 2}, {Kind: Check, Pages: Page(6), Expect: own}, {Kind: Barrier},
				{Kind: Fill, Pages: at(3), Version: 2}, {Kind: Check, Pages: at(3), Expect: own},
			},
			[]Op{
				{Kind: Check, Pages: Range(7, 4), Expect: snapshot}, {Kind: Remove, Pages: at(4)}, {Kind: Barrier},
				{Kind: Check, Pages: at(4), Expect: Expect{Zero: true}},
			},
			[]Op{
				{Kind: Check, Pages: Range(7, 4), Expect: snapshot}, {Kind: Check, Pages: Page(5*small + 7), Expect: snapshot}, {Kind: Barrier},
				{Kind: Remove, Pages: at(5)}, {Kind: Check, Pages: at(5), Expect: Expect{Zero: true}},
			})
	})
	if err != nil {
		return err
	}
	for len(l.vmms) > 0 { // their pages are needed
		l.vmms[0].Kill()
		l.vmms = l.vmms[1:]
	}
	_, err = l.wave(Config{PageSize: HugePageSize, Threads: 2, Regions: []Region{{Size: 4 * HugePageSize}}}, l.Seed, 1000)
	return err
}

// ReserveHugePages makes sure that so many huge pages of 2 MiB are free, and returns
// what gives them back. Until then every other caller waits, also in other processes. The
// error wraps [ErrSkip] where that is not possible.
func ReserveHugePages(n int) (release func(), err error) {
	f, err := os.OpenFile("/"+hugepages.Dir+"/nr_hugepages", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: needs %d huge pages of 2 MiB: %w", ErrSkip, n, err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("reserve huge pages: %w", err)
	}
	before, err := hugepages.Read("/")
	if err != nil {
		return nil, fmt.Errorf("reserve huge pages: %w", err)
	}
	set := func(to int) error {
		_, err := f.WriteAt([]byte(strconv.Itoa(to)), 0)
		return err
	}
	release = func() {
		_ = set(before.Total)
		f.Close()
	}
	if before.Free >= n {
		return release, nil
	}
	if err := set(before.Total - before.Free + n); err != nil {
		return nil, fmt.Errorf("%w: needs %d free huge pages: %w", ErrSkip, n, err)
	}
	after, err := hugepages.Read("/")
	if err == nil && after.Free < n {
		err = fmt.Errorf("%w: needs %d huge pages, and there is memory for %d", ErrSkip, n, after.Free)
	}
	if err != nil {
		_ = set(before.Total)
		return nil, err
	}
	return release, nil
}
