//go:build linux

package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestRecordedOrderKeepsNeighbours(t *testing.T) {
	const recording = "# from somewhere\n1024 r\n1025 w\n5 r\n\n5000 w\n1025 zeros 2\n"
	o, err := recorded(t.TempDir(), []byte(recording))
	if err != nil {
		t.Fatal(err)
	}
	defer o.memory.close()
	// Three blocks of 2 MiB are left.
	if want := []uint32{512, 513, 5, 1024 + 5000%512}; !slices.Equal(o.list, want) || o.memory.pages != 3*blockPages+spare {
		t.Errorf("pages %v of %d, want %v", o.list, o.memory.pages, want)
	}
	if want := []bool{false, true, false, true}; !slices.Equal(o.writes, want) {
		t.Errorf("writes %v, want %v", o.writes, want)
	}
	if len(o.memory.holes) != 2 || !o.memory.holes[513] || !o.memory.holes[514] {
		t.Errorf("holes %v", o.memory.holes)
	}
	if want := o.memory.word(512) + o.memory.word(5); o.sum() != want {
		t.Errorf("sum %#x, want %#x", o.sum(), want)
	}
	if short := o.first(2); len(short.list) != 2 || short.sum() != o.memory.word(512) {
		t.Errorf("the first two are %v", short.list)
	}
}

func TestRecordingInUse(t *testing.T) {
	r, err := parseRecording(bytes.NewReader(nginxOrder))
	if err != nil {
		t.Fatal(err)
	}
	if len(r.touches) < 500 || len(r.zeros) < 10 {
		t.Errorf("%d pages and %d runs of zeros: that is not what a guest touches", len(r.touches), len(r.zeros))
	}
}

func TestBadRecordings(t *testing.T) {
	for text, want := range map[string]string{
		"":                         "nothing was touched",
		"# only words\n":           "nothing was touched",
		"12\n":                     `line 1 of a recording: "12" is neither a page`,
		"12 x\n":                   "is neither a page",
		"12 r full\n":              "is neither a page",
		"1 r\n2 r\n1 w\n":          "line 3 of a recording: page 1 comes again",
		"99999999999999 r\n":       "value out of range",
		"-1 r\n":                   "invalid syntax",
		"1 zeros x\n":              "invalid syntax",
		"1 zeros 5\n":              "nothing was touched",
		strings.Repeat("1", 1<<17): "token too long",
	} {
		if _, err := parseRecording(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzParseRecording(f *testing.F) {
	f.Add("# x\n1024 r\n1025 w\n1025 zeros 3\n")
	f.Add("1 r\n1 r\n")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseRecording(strings.NewReader(text))
		if err != nil {
			return
		}
		again := r.String()
		same, err := parseRecording(strings.NewReader(again))
		if err != nil || same.String() != again {
			t.Errorf("%q was read as %v, and that as %v, %v", text, r, same, err)
		}
	})
}

func TestFindZeros(t *testing.T) {
	memory := make([]byte, 2*blockPages*pageSize)
	for p := range 2 * blockPages {
		if p%blockPages < 3 || p%blockPages == 5 {
			memory[p*pageSize] = 1
		}
	}
	r := recording{touches: []touch{{page: blockPages + 1}}}
	if err := r.findZeros(bytes.NewReader(memory)); err != nil {
		t.Fatal(err)
	}
	if want := []span{{blockPages + 3, 2}, {blockPages + 6, blockPages - 6}}; !slices.Equal(r.zeros, want) {
		t.Errorf("got %v, want %v", r.zeros, want)
	}
}
