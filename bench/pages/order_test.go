//go:build linux

package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestRecordedOrderKeepsNeighbours(t *testing.T) {
	const recording = "# from somewhere\n1024 r\n1025 w zero\n5 r\n\n5000 w\n"
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
	if len(o.memory.holes) != 1 || !o.memory.holes[513] {
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
	touches, err := parseOrder(bytes.NewReader(nginxOrder))
	if err != nil {
		t.Fatal(err)
	}
	if len(touches) < 500 {
		t.Errorf("%d pages: that is not what a guest touches", len(touches))
	}
}

func TestBadRecordings(t *testing.T) {
	for text, want := range map[string]string{
		"":                         "nothing was touched",
		"# only words\n":           "nothing was touched",
		"12\n":                     `line 1 of a recorded order: "12" is not a page`,
		"12 x\n":                   "is not a page",
		"12 r full\n":              "is not a page",
		"1 r\n2 r\n1 w\n":          "line 3 of a recorded order: page 1 comes again",
		"99999999999999 r\n":       "value out of range",
		"-1 r\n":                   "invalid syntax",
		strings.Repeat("1", 1<<17): "token too long",
	} {
		if _, err := parseOrder(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzParseOrder(f *testing.F) {
	f.Add("# x\n1024 r\n1025 w zero\n")
	f.Add("1 r\n1 r\n")
	f.Fuzz(func(t *testing.T, text string) {
		touches, err := parseOrder(strings.NewReader(text))
		if err != nil {
			return
		}
		var again strings.Builder
		for _, one := range touches {
			fmt.Fprintln(&again, one)
		}
		same, err := parseOrder(strings.NewReader(again.String()))
		if err != nil || !slices.Equal(touches, same) {
			t.Errorf("%q was read as %v, and that as %v, %v", text, touches, same, err)
		}
	})
}
