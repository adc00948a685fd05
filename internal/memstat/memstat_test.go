package memstat

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm"
)

// smaps of a process with 32 KiB of guest memory, split in two by the kernel,
// beside a heap and a file.
const smaps = `55d5a8d4c000-55d5a8d7a000 r--p 00000000 fe:00 131 /usr/bin/qemu system: x86
Size:                184 kB
KernelPageSize:        4 kB
Rss:                 180 kB
Pss:                  90 kB
Pss_Dirty:             0 kB
Shared_Clean:        180 kB
Shared_Dirty:          0 kB
Private_Clean:         0 kB
Private_Dirty:         0 kB
Referenced:          180 kB
Anonymous:             0 kB
KSM:                   0 kB
Swap:                  0 kB
SwapPss:               0 kB
THPeligible:           0
VmFlags: rd mr mw me sd
7f0000000000-7f0000004000 rw-p 00000000 00:01 2050 /memfd:template (deleted)
Rss:                  16 kB
Pss:                  10 kB
Shared_Clean:          0 kB
Shared_Dirty:          8 kB
Private_Clean:         0 kB
Private_Dirty:         8 kB
Anonymous:             4 kB
Swap:                  4 kB
7f0000004000-7f0000008000 rw-p 00004000 00:01 2050 /memfd:template (deleted)
Rss:                   4 kB
Pss:                   4 kB
Shared_Clean:          0 kB
Shared_Dirty:          0 kB
Private_Clean:         4 kB
Private_Dirty:         0 kB
Anonymous:             4 kB
Swap:                  0 kB
7f0000008000-7f000000c000 rw-p 00000000 00:00 0
Rss:                   8 kB
Pss:                   8 kB
Private_Dirty:         8 kB
Anonymous:             8 kB
`

const kb = 1 << 10

var guest = []vmm.Region{{Addr: 0x7f0000000000, Size: 32 << 10}}

// Huge pages are in fields of their own, and in no other.
func TestHugePages(t *testing.T) {
	const huge = `7f0000000000-7f0000800000 rw-p 00000000 00:10 4153 /anon_hugepage (deleted)
Size:               8192 kB
Rss:                   0 kB
Pss:                   0 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    6144 kB
`
	got, err := Parse(strings.NewReader(huge), []vmm.Region{{Addr: 0x7f0000000000, Size: 8 << 20}})
	if want := (Usage{RSS: 6 << 20, PSS: 6 << 20, Private: 6 << 20, Anon: 6 << 20, AnonPSS: 6 << 20}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}

func TestParse(t *testing.T) {
	got, err := Parse(strings.NewReader(smaps), guest)
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{
		RSS: 20 * kb, PSS: 14 * kb, Private: 12 * kb, Shared: 8 * kb,
		Anon: 8 * kb, AnonPSS: 8 * kb, FilePSS: 6 * kb, Swap: 4 * kb,
		OverheadRSS: 188 * kb, OverheadPSS: 98 * kb,
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestParseMerged: the kernel merged guest memory with a small neighbour.
func TestParseMerged(t *testing.T) {
	in := "7efffffff000-7f0000008000 rw-p 00000000 00:00 0\nRss: 36 kB\nPss: 36 kB\nAnonymous: 36 kB\n"
	got, err := Parse(strings.NewReader(in), guest)
	if err != nil || got.RSS != 36*kb || got.OverheadRSS != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
	// And here guest memory is the small part.
	got, err = Parse(strings.NewReader(in), []vmm.Region{{Addr: 0x7f0000007000, Size: 4 * kb}})
	if err != nil || got.RSS != 0 || got.OverheadRSS != 36*kb {
		t.Errorf("got %+v, %v", got, err)
	}
}

// TestParseKSM: of merged pages the PSS is less than what is anonymous.
func TestParseKSM(t *testing.T) {
	in := "7f0000000000-7f0000008000 rw-p 00000000 00:00 0\nRss: 32 kB\nPss: 12 kB\nAnonymous: 32 kB\nKSM: 24 kB\n"
	got, err := Parse(strings.NewReader(in), guest)
	if err != nil || got.Anon != 32*kb || got.AnonPSS != 12*kb || got.FilePSS != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestParseRefuses(t *testing.T) {
	head := "7f0000000000-7f0000004000 rw-p 00000000 00:00 0\n"
	for name, in := range map[string]string{
		"no header":   "Rss: 4 kB\n",
		"garbage":     "hello\n",
		"no number":   head + "Rss: x kB\n",
		"negative":    head + "Rss: -4 kB\n",
		"other unit":  head + "Rss: 4 MB\n",
		"huge":        head + "Rss: 9223372036854775807 kB\n",
		"backwards":   "7f0000004000-7f0000000000 rw-p 00000000 00:00 0\n",
		"endless":     strings.Repeat("x", 1<<20),
		"bad address": "7f000000zz00-7f0000004000 rw-p\n",
	} {
		if got, err := Parse(strings.NewReader(in), guest); err == nil {
			t.Errorf("%s: taken as %+v", name, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(smaps), uint64(0x7f0000000000), int64(32<<10))
	f.Add([]byte("0-ffffffffffffffff rw-p\nRss: 1 kB\n"), uint64(math.MaxUint64), int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, b []byte, addr uint64, size int64) {
		u, err := Parse(bytes.NewReader(b), []vmm.Region{{Addr: addr, Size: size}})
		if err != nil && u != (Usage{}) {
			t.Errorf("an error and %+v", u)
		}
		if err == nil && (u.AnonPSS > u.PSS || u.FilePSS < 0 || u.RSS < 0 || u.OverheadPSS < 0) {
			t.Errorf("got %+v", u)
		}
	})
}

// TestProcess measures this process, which maps a memfd and writes to a part.
func TestProcess(t *testing.T) {
	page := os.Getpagesize()
	fd, err := unix.MemfdCreate("fcvm-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "template")
	defer f.Close()
	if _, err := f.Write(make([]byte, 64*page)); err != nil {
		t.Fatal(err)
	}
	if n, err := Resident(f); err != nil || n != int64(64*page) {
		t.Errorf("Resident: %d, %v", n, err)
	}
	mem, err := unix.MmapPtr(fd, 0, nil, uintptr(64*page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.MunmapPtr(mem, uintptr(64*page)); err != nil {
			t.Error(err)
		}
	}()
	b := bytesAt(mem, 64*page)
	sink := byte(0)
	for i := range 64 {
		sink += b[i*page]
	}
	for i := range 16 {
		b[i*page] = sink + 1
	}
	u, err := Process(os.Getpid(), []vmm.Region{{Addr: uint64(uintptr(mem)), Size: int64(64 * page)}})
	if err != nil {
		t.Fatal(err)
	}
	p := int64(page)
	if u.RSS != 64*p || u.PSS != 64*p || u.Anon != 16*p || u.FilePSS != 48*p || u.Private+u.Shared != 64*p {
		t.Errorf("got %+v, in pages of %d", u, page)
	}
	if u.OverheadPSS <= 0 || u.OverheadRSS < u.OverheadPSS {
		t.Errorf("overhead of %+v", u)
	}
}

func TestProcessGone(t *testing.T) {
	// Pids end at 2^22 (proc_sys_kernel_pid_max(5)).
	if _, err := Process(1<<22+1, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestTotal(t *testing.T) {
	clone := func(template string, anon, filePSS, rss int64) VM {
		return VM{Usage: Usage{RSS: rss, PSS: anon + filePSS, Anon: anon, AnonPSS: anon, FilePSS: filePSS, OverheadPSS: 7}, Template: template, MemoryBytes: 1000}
	}
	for _, c := range []struct {
		name      string
		vms       []VM
		templates map[string]int64
		want      Totals
		saved     float64
	}{
		{name: "nothing"},
		{
			name: "one golden VM", vms: []VM{clone("", 100, 0, 100)},
			want: Totals{Unshared: 100, Held: 100, Overhead: 7, Memory: 1000},
		},
		{
			name:      "two clones, a template that is larger than what they map",
			vms:       []VM{clone("a", 10, 40, 90), clone("a", 20, 40, 100)},
			templates: map[string]int64{"a": 100},
			want:      Totals{Unshared: 190, Held: 130, Overhead: 14, Memory: 2000}, saved: 100 * (1 - 130./190),
		},
		{
			name: "two clones of a memory file",
			vms:  []VM{clone("a", 10, 40, 90), clone("a", 20, 40, 100)},
			want: Totals{Unshared: 190, Held: 110, Overhead: 14, Memory: 2000}, saved: 100 * (1 - 110./190),
		},
		{
			name:      "two templates",
			vms:       []VM{clone("a", 10, 40, 50), clone("b", 20, 30, 50)},
			templates: map[string]int64{"a": 40, "b": 5},
			want:      Totals{Unshared: 100, Held: 100, Overhead: 14, Memory: 2000},
		},
		{
			name:      "a template without clones is held as well",
			templates: map[string]int64{"a": 40},
			want:      Totals{Held: 40},
		},
		{
			name:      "one clone that has read little of its template",
			vms:       []VM{clone("a", 0, 10, 10)},
			templates: map[string]int64{"a": 20},
			want:      Totals{Unshared: 10, Held: 20, Overhead: 7, Memory: 1000}, saved: -100,
		},
	} {
		got := Total(c.vms, c.templates)
		if got != c.want {
			t.Errorf("%s: got %+v, want %+v", c.name, got, c.want)
		}
		if d := got.SavedPercent() - c.saved; math.Abs(d) > 1e-9 {
			t.Errorf("%s: saved %v%%, want %v%%", c.name, got.SavedPercent(), c.saved)
		}
	}
}

func BenchmarkProcess(b *testing.B) {
	for b.Loop() {
		if _, err := Process(os.Getpid(), guest); err != nil {
			b.Fatal(err)
		}
	}
}
