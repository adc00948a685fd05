package firecracker

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/fcapi"
)

// Of the real 1.16.1, built with glibc: a thread's heap lies behind the guest's memory.
const smaps = `55a283b57000-55a283b58000 rw-p 00000000 00:00 0 
Size:                  4 kB
Rss:                   4 kB
VmFlags: rd wr mr mw me ac sd 
7f6b28000000-7f6b28021000 rw-p 00000000 00:00 0 
Size:                132 kB
VmFlags: rd wr mr mw me nr sd 
7f6b28021000-7f6b2c000000 ---p 00000000 00:00 0 
Size:              65404 kB
VmFlags: mr mw me nr sd 
7f6b30000000-7f6b40021000 rw-p 00000000 00:00 0 
Size:             262276 kB
VmFlags: rd wr mr mw me nr sd 
7f6b46104000-7f6b46307000 r--s 00000000 00:0f 123                        /some file
VmFlags: rd mr me ms nr sd 
7f6b48000000-7f6b48100000 rw-p 00200000 00:01 42                         /memfd:template (deleted)
VmFlags: rd wr mr mw me nr sd 
`

func TestParseSmaps(t *testing.T) {
	all, err := parseSmaps(strings.NewReader(smaps))
	want := []mapping{{from: 0x7f6b28000000, to: 0x7f6b28021000}, {from: 0x7f6b30000000, to: 0x7f6b40021000}, {from: 0x7f6b48000000, to: 0x7f6b48100000, offset: 0x200000, file: true}}
	if err != nil || !slices.Equal(all, want) {
		t.Fatalf("%+v, error %v", all, err)
	}
	// Of 1.16.1 with huge_pages 2M, on Linux 6.1.
	const huge = `7f0c00000000-7f0c0c000000 rw-p 00000000 00:10 4153                       /anon_hugepage (deleted)
Size:             196608 kB
Private_Hugetlb:   30720 kB
VmFlags: rd wr mr mw me nr ht sd 
`
	if all, err := parseSmaps(strings.NewReader(huge)); err != nil || !slices.Equal(all, []mapping{{from: 0x7f0c00000000, to: 0x7f0c0c000000}}) {
		t.Errorf("huge pages: %+v, error %v", all, err)
	}
	for _, bad := range []string{"nonsense\n", "12-34\n", "zz-34 rw-p 0 0 0\n", "34-12 rw-p 0 0 0\n"} {
		if _, err := parseSmaps(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is let through", bad)
		}
	}
}

const mib = 1 << 20

func TestPieces(t *testing.T) {
	older, newer := fcapi.Version{Major: 1, Minor: 12, Patch: 1}, fcapi.Version{Major: 1, Minor: 13}
	for _, c := range []struct {
		version fcapi.Version
		size    int64
		want    []uint64
	}{
		{older, 3328 * mib, []uint64{3328 * mib}},
		{older, 4096 * mib, []uint64{3328 * mib, 768 * mib}},
		{newer, 3072 * mib, []uint64{3072 * mib}},
		{newer, 3074 * mib, []uint64{3072 * mib, 2 * mib}},
	} {
		if got := pieces(c.size, c.version); !slices.Equal(got, c.want) {
			t.Errorf("%d MiB with %v: %d, want %d", c.size/mib, c.version, got, c.want)
		}
	}
}

// A guest's memory is one mapping or two, which may be one with each other and with
// something else.
func TestPlaces(t *testing.T) {
	const at = 0x100 * mib
	for _, c := range []struct {
		name          string
		all           []mapping
		sizes         []uint64
		first, second uint64
	}{
		{"one, by itself", []mapping{{from: at, to: at + 8*mib}}, []uint64{8 * mib}, at, 0},
		{"one, a heap behind it", []mapping{{from: at, to: at + 9*mib}}, []uint64{8 * mib}, at, 0},
		{"one, a heap before it", []mapping{{from: at - mib, to: at + 8*mib}}, []uint64{8 * mib}, at, 0},
		{"two, apart", []mapping{{from: at, to: at + 8*mib}, {from: 2 * at, to: 2*at + 2*mib}}, []uint64{8 * mib, 2 * mib}, at, 2 * at},
		{"two, the second before the first", []mapping{{from: at - 2*mib, to: at + 8*mib}}, []uint64{8 * mib, 2 * mib}, at, at - 2*mib},
		{"two, the second behind the first", []mapping{{from: at, to: at + 10*mib}}, []uint64{8 * mib, 2 * mib}, at, at + 8*mib},
		{"two and a heap before them", []mapping{{from: at - 3*mib, to: at + 8*mib}}, []uint64{8 * mib, 2 * mib}, at, at - 2*mib},
		{"two and a heap behind them", []mapping{{from: at - 2*mib, to: at + 9*mib}}, []uint64{8 * mib, 2 * mib}, at, at - 2*mib},
	} {
		if got := candidates(c.all, c.sizes); !slices.Contains(got, c.first) {
			t.Errorf("%s: candidates %x lack %x", c.name, got, c.first)
			continue
		}
		if len(c.sizes) == 1 {
			continue
		}
		got, ok := beside(c.all, mapping{from: c.first, to: c.first + c.sizes[0]}, c.sizes[1])
		if !ok || got != c.second {
			t.Errorf("%s: the second piece is at %x (%v), want %x", c.name, got, ok, c.second)
		}
	}
	if _, ok := beside([]mapping{{from: at, to: at + 8*mib}}, mapping{from: at, to: at + 8*mib}, 2*mib); ok {
		t.Error("a second piece is found where there is none")
	}
}

func TestWhole(t *testing.T) {
	all := []mapping{{from: 4 * mib, to: 6 * mib, offset: 8 * mib, file: true}, {from: 16 * mib, to: 24 * mib, file: true}, {from: 32 * mib, to: 34 * mib}}
	got, ok := whole(all, []uint64{8 * mib, 2 * mib})
	want := []vmm.Region{{Addr: 16 * mib, Size: 8 * mib}, {Addr: 4 * mib, Size: 2 * mib, Offset: 8 * mib}}
	if !ok || !slices.Equal(got, want) {
		t.Errorf("%+v, %v, want %+v", got, ok, want)
	}
	for _, sizes := range [][]uint64{{mib}, {2 * mib}, {2 * mib, 8 * mib}, {8 * mib, 3 * mib}} {
		if got, ok := whole(all, sizes); ok {
			t.Errorf("%d: %+v", sizes, got)
		}
	}
}

func TestHolds(t *testing.T) {
	mem := make([]byte, 0x23000)
	const line = "quiet console=ttyS0"
	if holds(bytes.NewReader(mem), 0, line) {
		t.Error("empty memory was booted")
	}
	copy(mem[0x21000:], line+" more")
	if !holds(bytes.NewReader(mem), 0x1000, line) || holds(bytes.NewReader(mem), 0, line) || holds(bytes.NewReader(mem), 0x2000, line) {
		t.Error("the command line is found in another place")
	}
}

func FuzzParseSmaps(f *testing.F) {
	f.Add(smaps)
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseSmaps(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, at := range candidates(all, []uint64{4096}) {
			if !slices.ContainsFunc(all, func(m mapping) bool { return m.from <= at && at+4096 <= m.to }) {
				t.Errorf("%x is in no mapping", at)
			}
		}
	})
}
