package firecracker

import (
	"bytes"
	"slices"
	"strings"
	"testing"
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
`

func TestParseSmaps(t *testing.T) {
	all, err := parseSmaps(strings.NewReader(smaps))
	want := []mapping{{0x7f6b28000000, 0x7f6b28021000}, {0x7f6b30000000, 0x7f6b40021000}}
	if err != nil || !slices.Equal(all, want) {
		t.Fatalf("%x, error %v", all, err)
	}
	if got := candidates(all, 256<<20); !slices.Equal(got, []uint64{0x7f6b30000000, 0x7f6b30021000}) {
		t.Errorf("candidates %x", got)
	}
	if got := candidates(all, 132<<10); len(got) != 3 || got[0] != 0x7f6b28000000 {
		t.Errorf("candidates of an exact size %x", got)
	}
	for _, bad := range []string{"nonsense\n", "12-34\n", "zz-34 rw-p 0 0 0\n", "34-12 rw-p 0 0 0\n"} {
		if _, err := parseSmaps(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is let through", bad)
		}
	}
}

func TestIsBooted(t *testing.T) {
	mem := make([]byte, 0x22000)
	const line = "console=ttyS0 quiet"
	if isBooted(bytes.NewReader(mem), 0, line) {
		t.Error("empty memory was booted")
	}
	copy(mem[0x21000:], line+" more")
	if !isBooted(bytes.NewReader(mem), 0x1000, line) || isBooted(bytes.NewReader(mem), 0, line) || isBooted(bytes.NewReader(mem), 0x2000, line) {
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
		for _, at := range candidates(all, 4096) {
			if !slices.ContainsFunc(all, func(m mapping) bool { return m.from <= at && at+4096 <= m.to }) {
				t.Errorf("%x is in no mapping", at)
			}
		}
	})
}
