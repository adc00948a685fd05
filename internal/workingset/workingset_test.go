package workingset

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	id := ID{1, 2, 3}
	s := New(id, 130)
	want := []int64{0, 63, 64, 129}
	for _, p := range want {
		s.Add(p)
	}
	s.Cold, s.Warm = Tally{2, 100}, Tally{4, 20}
	b := s.Encode()
	if len(b) != FileSize(130) {
		t.Errorf("%d bytes, want %d", len(b), FileSize(130))
	}
	back, err := Parse(b, id, 130)
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Collect(back.All()); !slices.Equal(got, want) || back.Count() != 4 || !back.Has(63) || back.Has(62) {
		t.Errorf("got %v", got)
	}
	if rate, ok := back.HitRate(); !ok || math.Abs(rate-0.9) > 1e-9 {
		t.Errorf("hit rate %v, %v", rate, ok)
	}
	if _, ok := New(id, 1).HitRate(); ok {
		t.Error("a hit rate of nothing")
	}
}

func TestUnusable(t *testing.T) {
	id := ID{9}
	good := New(id, 65).Encode()
	flipped := bytes.Clone(good)
	flipped[headerSize] ^= 1
	behind := New(id, 65)
	behind.words[1] = 2 // page 65 of 65
	for name, c := range map[string]struct {
		b     []byte
		id    ID
		pages int64
	}{
		"empty":                {nil, id, 65},
		"torn":                 {good[:len(good)-1], id, 65},
		"flipped":              {flipped, id, 65},
		"of another snapshot":  {good, ID{8}, 65},
		"of other pages":       {good, id, 66},
		"of other size":        {good, id, 1000},
		"behind the end":       {behind.Encode(), id, 65},
		"of no pages":          {good, id, 0},
		"of very many":         {good, id, maxPages + 1},
		"nonsense of its size": {bytes.Repeat([]byte{7}, len(good)), id, 65},
	} {
		if _, err := Parse(c.b, c.id, c.pages); !errors.Is(err, ErrUnusable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(New(ID{}, 70).Encode(), uint16(70))
	f.Add([]byte(magic), uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, pages uint16) {
		s, err := Parse(b, ID{}, int64(pages))
		if err != nil {
			return
		}
		if !bytes.Equal(s.Encode(), b) {
			t.Error("accepted, and not the same")
		}
		for p := range s.All() {
			if p >= int64(pages) {
				t.Errorf("page %d of %d", p, pages)
			}
		}
	})
}
