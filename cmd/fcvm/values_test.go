//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/guest"
	"fcvm/internal/guest/proto"
	"fcvm/internal/image"
	"fcvm/internal/snapshot"
)

func TestParseMemory(t *testing.T) {
	for s, want := range map[string]int64{
		"128m": 128 << 20, "512M": 512 << 20, "1g": 1 << 30, "1.5g": 3 << 29, "2GiB": 2 << 30, "262144k": 256 << 20,
		"134217728": 128 << 20, "134217729b": 130 << 20, "129m": 130 << 20,
		"": 0, "m": 0, "lots": 0, "-1g": 0, "127m": 0, "64": 0, "2t": 0, "1x": 0, "99999999999999999999g": 0,
	} {
		got, err := parseMemory(s)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: got %d, %v, want %d", s, got, err, want)
		}
		if err != nil && !strings.Contains(err.Error(), s) {
			t.Errorf("%q is not in its error: %v", s, err)
		}
	}
}

func TestParseCPUs(t *testing.T) {
	for s, want := range map[string]float64{
		"1": 1, "2": 2, "4.0": 4, "255": 255,
		"": 0, "0": 0, "0.5": 0, "1.5": 0, "-1": 0, "256": 0, "100000": 0, "many": 0, "NaN": 0, "Inf": 0, "1e9": 0,
	} {
		if got, err := parseCPUs(s); got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: got %v, %v, want %v", s, got, err, want)
		}
	}
}

func TestReadEnvFile(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []string
		err  bool
	}{
		{"A=1\nB=two words\n", []string{"A=1", "B=two words"}, false},
		{"# comment\n\n  \t\n  A=1\r\nQ=\"quoted\"\nE=\nN\nX=a=b#c", []string{"A=1", `Q="quoted"`, "E=", "N", "X=a=b#c"}, false},
		{"\ufeffA=1", []string{"A=1"}, false},
		{"A B=1", nil, true},
		{"=1", nil, true},
		{"A=\x00", nil, true},
		{strings.Repeat("x", 2<<20), nil, true},
	} {
		got, err := readEnvFile(strings.NewReader(tt.text), "f")
		if !slices.Equal(got, tt.want) || (err != nil) != tt.err {
			t.Errorf("%.40q: got %q, %v", tt.text, got, err)
		}
	}
}

func FuzzReadEnvFile(f *testing.F) {
	f.Add("A=1\n# c\nB")
	f.Fuzz(func(t *testing.T, text string) {
		lines, err := readEnvFile(strings.NewReader(text), "f")
		if err != nil {
			return
		}
		for _, l := range lines {
			if name, _, _ := strings.Cut(l, "="); name == "" || strings.ContainsAny(name, " \t") {
				t.Fatalf("%q", l)
			}
		}
	})
}

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"":                          {},
		"10m":                       now.Add(-10 * time.Minute),
		"2026-01-02":                time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC),
		"2026-01-02T03:04:05":       time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		"2026-01-02T03:04:05+01:00": time.Date(2026, 1, 2, 2, 4, 5, 0, time.UTC),
		"1700000000":                time.Unix(1700000000, 0),
		"1700000000.5":              time.Unix(1700000000, 5e8),
	} {
		if got, err := parseSince(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: got %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"yesterday", "-", "1e99", "2026-13-01"} {
		if got, err := parseSince(s, now); err == nil {
			t.Errorf("%q: got %v", s, got)
		}
	}
}

func TestParseSeconds(t *testing.T) {
	for s, want := range map[string]time.Duration{"0": 0, "10": 10 * time.Second, "1.5": 1500 * time.Millisecond, "1m30s": 90 * time.Second} {
		if got, err := parseSeconds(s); err != nil || got != want {
			t.Errorf("%q: got %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "soon", "-1", "-1s", "NaN", "1e300"} {
		if got, err := parseSeconds(s); err == nil {
			t.Errorf("%q: got %v", s, got)
		}
	}
}

func TestSplitPath(t *testing.T) {
	for arg, want := range map[string][2]string{
		"vm:/a": {"vm", "/a"}, "vm:a:b": {"vm", "a:b"}, "/a:b": {"", "/a:b"}, "./vm:/a": {"", "./vm:/a"},
		"../x:y": {"", "../x:y"}, "dir/x:y": {"", "dir/x:y"}, "plain": {"", "plain"}, ":x": {"", ":x"}, "-": {"", "-"},
	} {
		if vm, p := splitPath(arg); vm != want[0] || p != want[1] {
			t.Errorf("%q: got %q and %q, want %q", arg, vm, p, want)
		}
	}
}

func TestWantsJSON(t *testing.T) {
	for args, want := range map[string]bool{
		"ls --json": true, "--data-dir x ls --json": true, "ls": false, "run image cmd --json": false, "exec vm cmd --json": false,
		"inspect -- --json": false, "": false,
	} {
		if got := wantsJSON(strings.Fields(args)); got != want {
			t.Errorf("%q: got %v", args, got)
		}
	}
}

// The table of exit codes, as `fcvm help exit-codes` documents it.
func TestExitCodes(t *testing.T) {
	own := func(err error) error { return &ownError{err} }
	for _, tt := range []struct {
		err  error
		want int
	}{
		{errors.New("x"), 1},
		{invalid("x"), 2},
		{&api.Error{Code: api.CodeInvalid}, 2},
		{&api.Error{Code: api.CodeNotFound}, 3},
		{&api.Error{Code: api.CodeConflict}, 4},
		{&api.Error{Code: api.CodeUnavailable}, 5},
		{&api.Error{Code: api.CodeState}, 6},
		{&api.Error{Code: api.CodeInternal}, 1},
		{fmt.Errorf("pull: %w", image.ErrUnknown), 3},
		{fmt.Errorf("pull: %w", image.ErrRegistry), 5},
		{fmt.Errorf("open: %w", snapshot.ErrDamaged), 7},
		{fmt.Errorf("rm: %w", snapshot.ErrInUse), 4},
		{fmt.Errorf("write: %w", syscall.ENOSPC), 5},
		{guest.ErrNotSetUp, 5},
		{own(guest.ErrNotSetUp), 125},
		{own(invalid("x")), 125},
		{own(&api.Error{Code: api.CodeConflict}), 125},
		{own(&api.Error{Code: api.CodeInvalid, ExitCode: 127}), 127},
		{own(&proto.Error{Code: 126}), 126},
	} {
		if got := describe(tt.err, nil); got.ExitCode != tt.want || got.Version != 1 || got.Code == "" {
			t.Errorf("%v: got %+v, want %d", tt.err, got, tt.want)
		}
	}
	interrupted := describe(own(fmt.Errorf("pull: %w", context.Canceled)), syscall.SIGTERM)
	if interrupted.ExitCode != 143 || interrupted.Message != "interrupted" {
		t.Errorf("%+v", interrupted)
	}
	for code, exit := range codes() {
		if !strings.Contains(exitCodesLong, string(code)) || !strings.Contains(exitCodesLong, fmt.Sprintf("\n    %d ", exit)) {
			t.Errorf("%s or %d is not documented", code, exit)
		}
	}
}
