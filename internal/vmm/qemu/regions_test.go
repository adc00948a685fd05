package qemu

import (
	"strings"
	"testing"
)

func TestCheckMapped(t *testing.T) {
	const maps = `7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000100000-7f0000180000 rw-p 00000000 00:01 77 /memfd:template (deleted)
7f0000180000-7f0000200000 ---p 00000000 00:00 0
7f0000300000-7f0000400000 rw-s 00000000 00:00 0
`
	for _, c := range []struct {
		addr, size uint64
		want       string
	}{
		{0x7f0000000000, 0x100000, ""},
		{0x7f0000000000, 0x180000, ""},
		{0x7f0000080000, 0x1000, ""},
		{0x7f0000000000, 0x181000, "---p"},
		{0x7f0000300000, 0x1000, "rw-s"},
		{0x7f0000250000, 0x1000, "0 of 4096"},
		{0x6f0000000000, 0x1000, "0 of 4096"},
	} {
		err := checkMapped(strings.NewReader(maps), c.addr, c.size)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%#x+%#x: %v, want %q", c.addr, c.size, err, c.want)
		}
	}
	if err := checkMapped(strings.NewReader("rubbish\n"), 0, 1); err == nil {
		t.Error("rubbish is taken for a mapping")
	}
}
