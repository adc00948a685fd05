package procmem

import (
	"bytes"
	"fmt"
	"testing"
)

// TestPagesOfATemplate has neighbours of different kinds, and pages that were
// given back.
func TestPagesOfATemplate(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 1000, template(t, 1000))
		tune(r.Process)
		// The kernel maps the pages around a read as well; a write only its own.
		r.do(op{Do: "read", Pages: 1000})
		r.do(op{Do: "fill", First: 10, Pages: 3, Byte: 9})
		r.do(op{Do: "discard", First: 12, Pages: 500})
		r.do(op{Do: "fill", First: 511, Pages: 2, Byte: 9})
		want := "0+10 file, 10+2 private, 511+2 private, 513+487 file, "
		if got := r.pages(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestPagesOfAnonymousMemory(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 1000, "")
		tune(r.Process)
		r.do(op{Do: "fill", First: 5, Pages: 5, Byte: 1})
		r.do(op{Do: "read", First: 10, Pages: 5})
		want := "5+5 private, 10+5 zero, "
		if !r.scan { // see Pages
			want = "5+10 private, "
		}
		if got := r.pages(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// TestOpenPagemapOpensNoMemory: it works where ptrace is not allowed.
func TestOpenPagemapOpensNoMemory(t *testing.T) {
	r := start(t, 10, "")
	r.do(op{Do: "fill", First: 2, Pages: 3, Byte: 1})
	p, err := OpenPagemap(r.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := p.PrivateBytes(r.addr, r.size); err != nil || n != int64(3*page) {
		t.Errorf("PrivateBytes: %d, %v", n, err)
	}
	if p.mem != nil {
		t.Error("it has opened memory")
	}
	if _, err := p.Dump(t.Context(), r.regions(), create(t, r.size), Options{}); err == nil {
		t.Error("Dump works")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func (r *remote) pages() string {
	r.t.Helper()
	var b bytes.Buffer
	err := r.Pages(r.addr, r.size, func(run Run, k Kind) error {
		name := map[Kind]string{Private: "private", Zero: "zero", File: "file"}[k]
		fmt.Fprintf(&b, "%d+%d %s, ", run.Offset/int64(page), run.Len/int64(page), name)
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return b.String()
}
