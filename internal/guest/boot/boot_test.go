package boot

import (
	"maps"
	"slices"
	"testing"
	"unsafe"
)

func TestParseCmdline(t *testing.T) {
	got := parseCmdline("console=ttyS0 quiet fcvm.ip=10.0.2.15/24 a=1 a=b=c\n")
	want := map[string]string{"console": "ttyS0", "quiet": "", "fcvm.ip": "10.0.2.15/24", "a": "b=c"}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestParseList(t *testing.T) {
	got := parseList("a: x y a\nb:\nnonsense\n")
	if !slices.Equal(got["a"], []string{"x", "y", "a"}) || len(got["b"]) != 0 || len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

func TestModuleParams(t *testing.T) {
	params := map[string]string{"virtio-blk.queue_depth": "8", "virtio_blk.num_request_queues": "1", "other.x": "y", "quiet": ""}
	if got := moduleParams(params, "virtio_blk"); got != "num_request_queues=1 queue_depth=8" {
		t.Errorf("got %q", got)
	}
	if got := moduleParams(params, "erofs"); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestMask(t *testing.T) {
	for bits, want := range map[int][4]byte{0: {}, 8: {255}, 24: {255, 255, 255}, 30: {255, 255, 255, 252}, 32: {255, 255, 255, 255}} {
		if got := maskOf(bits); got != want {
			t.Errorf("maskOf(%d) = %v, want %v", bits, got, want)
		}
	}
}

// The kernel copies sizeof(struct rtentry) bytes, 120 on 64-bit machines.
func TestRouteEntrySize(t *testing.T) {
	if got := unsafe.Sizeof(rtentry{}); got != 120 {
		t.Errorf("size %d, want 120", got)
	}
	if got := unsafe.Offsetof(rtentry{}.flags); got != 56 {
		t.Errorf("flags at %d, want 56", got)
	}
}
