//go:build linux

package pstest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
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

const hugePool = "/sys/kernel/mm/hugepages/hugepages-2048kB/"

// ReserveHugePages makes sure that so many huge pages of 2 MiB are free, and returns
// what gives them back. The error wraps [ErrSkip] where that is not possible.
func ReserveHugePages(n int) (release func(), err error) {
	count := func(name string) (int, error) {
		b, err := os.ReadFile(hugePool + name)
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(string(b)))
	}
	free, err := count("free_hugepages")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: this kernel has no huge pages of 2 MiB", ErrSkip)
	}
	reserved, err2 := count("resv_hugepages")
	before, err3 := count("nr_hugepages")
	if err := errors.Join(err, err2, err3); err != nil {
		return nil, fmt.Errorf("reserve huge pages: %w", err)
	}
	if free-reserved >= n {
		return func() {}, nil
	}
	set := func(to int) error {
		return os.WriteFile(hugePool+"nr_hugepages", []byte(strconv.Itoa(to)), 0)
	}
	if err := set(before + n); err != nil {
		return nil, fmt.Errorf("%w: needs %d free huge pages, or to reserve them: %w", ErrSkip, n, err)
	}
	release = func() {
		if now, err := count("nr_hugepages"); err == nil {
			_ = set(max(now-n, before))
		}
	}
	after, err := count("nr_hugepages")
	if err == nil && after < before+n {
		err = fmt.Errorf("%w: needs %d more huge pages, and there is memory for %d", ErrSkip, n, after-before)
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}
