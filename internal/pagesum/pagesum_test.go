package pagesum

import (
	"bytes"
	"errors"
	"testing"
)

func page(b byte) []byte { return bytes.Repeat([]byte{b}, PageSize) }

func TestRoundTripAndCheck(t *testing.T) {
	data := append(append(page(1), page(0)...), page(2)...)
	table := New(5)
	for i := range int64(3) {
		table.Set(1+i, Of(data[i*PageSize:(i+1)*PageSize]))
	}
	back, err := Read(bytes.NewReader(table.Bytes()), 5)
	if err != nil {
		t.Fatal(err)
	}
	if back.Pages() != 5 || back.Sum(0) != 0 || back.Sum(2) != 0 || back.Sum(1) == 0 {
		t.Errorf("%d pages, sums %x %x %x", back.Pages(), back.Sum(0), back.Sum(1), back.Sum(2))
	}
	if bad := back.Check(1, data); bad != -1 {
		t.Errorf("page %d is said to have changed", bad)
	}
	for i := range int64(3) {
		data[i*PageSize+77] ^= 4
		if bad := back.Check(1, data); bad != 1+i {
			t.Errorf("page %d changed, and %d is said to have", 1+i, bad)
		}
		data[i*PageSize+77] ^= 4
	}
}

func TestDamaged(t *testing.T) {
	good := New(4).Bytes()
	other := New(5).Bytes()
	for name, raw := range map[string][]byte{
		"empty": nil, "short": good[:len(good)-1], "long": append(bytes.Clone(good), 0), "another memory's": other,
		"no magic": append([]byte("x"), good[1:]...), "header alone": good[:headerSize],
	} {
		if _, err := Read(bytes.NewReader(raw), 4); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(New(3).Bytes(), uint8(3))
	f.Add([]byte(magic), uint8(0))
	f.Fuzz(func(t *testing.T, raw []byte, pages uint8) {
		table, err := Read(bytes.NewReader(raw), int64(pages))
		if err == nil && !bytes.Equal(table.Bytes(), raw) {
			t.Error("accepted, and not the same")
		}
	})
}

func BenchmarkOf(b *testing.B) {
	p := page(7)
	b.SetBytes(PageSize)
	for b.Loop() {
		Of(p)
	}
}
