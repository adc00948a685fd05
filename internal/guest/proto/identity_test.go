package proto

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestIdentity(t *testing.T) {
	for name, id := range map[string]Identity{
		"all":     {Hostname: "web-1", MachineID: strings.Repeat("0a", 16), Entropy: []byte{1, 0, 2}, Wall: time.Unix(1_800_000_000, 5)},
		"nothing": {},
		"longest": {Hostname: strings.Repeat("h", 64), Entropy: make([]byte, MaxEntropy)},
	} {
		b, err := id.AppendBinary([]byte("before"))
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseIdentity(b[len("before"):])
		if err != nil || got.Hostname != id.Hostname || got.MachineID != id.MachineID || !bytes.Equal(got.Entropy, id.Entropy) || !got.Wall.Equal(id.Wall) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, id)
		}
		for cut := range b[len("before"):] {
			if _, err := ParseIdentity(b[len("before"):][:cut]); !errors.Is(err, ErrMalformed) {
				t.Errorf("%s, cut to %d bytes: %v, want ErrMalformed", name, cut, err)
			}
		}
	}
	for name, id := range map[string]Identity{
		"host name": {Hostname: strings.Repeat("h", 65)},
		"entropy":   {Entropy: make([]byte, MaxEntropy+1)},
	} {
		if _, err := id.AppendBinary(nil); err == nil {
			t.Errorf("a %s that is too long was encoded", name)
		}
	}
}

func FuzzParseIdentity(f *testing.F) {
	b, err := Identity{Hostname: "web-1", Entropy: []byte{1, 2}, Wall: time.Unix(1, 2)}.AppendBinary(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		id, err := ParseIdentity(in)
		if err != nil {
			return
		}
		again, err := id.AppendBinary(nil)
		if err == nil && !bytes.Equal(again, in) {
			t.Fatalf("%x was read as what is written %x", in, again)
		}
	})
}
