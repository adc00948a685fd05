//go:build linux

package pageserver

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func openTestLedger(t *testing.T, pages int64) (*ledger, *os.File) {
	t.Helper()
	f, err := newLedgerFile(pages)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := dup(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	l, err := openLedger(f, pages)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return l, os.NewFile(uintptr(copied), "ledger")
}

// What one page server noted, the next one knows.
func TestLedgerOutlivesItsServer(t *testing.T) {
	const pages = 130
	l, again := openTestLedger(t, pages)
	if l.removed(5) || l.removedPages() != 0 {
		t.Error("pages were removed from the start")
	}
	l.remove(5, 2)
	l.remove(129, 1)
	l.remove(6, 1) // twice is as once
	l.save(&counters{Faults: 7, Handovers: 3})

	next, err := openLedger(again, pages)
	if err != nil {
		t.Fatal(err)
	}
	defer next.close()
	for page, want := range map[int64]bool{4: false, 5: true, 6: true, 7: false, 128: false, 129: true} {
		if next.removed(page) != want {
			t.Errorf("page %d removed: %v, want %v", page, !want, want)
		}
	}
	if n := next.removedPages(); n != 3 {
		t.Errorf("%d pages removed, want 3", n)
	}
	var c counters
	next.load(&c)
	if c != (counters{Faults: 7, Handovers: 3}) {
		t.Errorf("counters %+v", c)
	}
}

func TestLedgerIsChecked(t *testing.T) {
	_, other := openTestLedger(t, 64)
	if _, err := openLedger(other, 65); !errors.Is(err, errLedger) {
		t.Errorf("of other pages: %v", err)
	}
	// A memfd that its maker could cut off would be SIGBUS.
	fd, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, ledgerSize(64)); err != nil {
		t.Fatal(err)
	}
	if _, err := openLedger(os.NewFile(uintptr(fd), "unsealed"), 64); !errors.Is(err, errLedger) {
		t.Errorf("unsealed: %v", err)
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openLedger(f, 64); err == nil {
		t.Error("a device was taken for a ledger")
	}
}
