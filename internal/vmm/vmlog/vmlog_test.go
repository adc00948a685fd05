package vmlog

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

func writeLog(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTail(t *testing.T) {
	long := strings.Repeat("0123456789abcde\n", 1000) + "last\n"
	for _, c := range []struct {
		content string
		skip    int64
		lines   int
		want    string
	}{
		{"", 0, 3, ""},
		{"one\ntwo\r\nthree\n", 0, 2, "two\nthree"},
		{"one\ntwo", 0, 9, "one\ntwo"},
		{"old\nnew\n", 4, 9, "new"},
		{"old\n", 4, 9, ""},
		{"\x1b[31mred\x1b[0m\tx\x00\xff\n", 0, 9, "[31mred[0m x"},
		{long, 0, 2, "0123456789abcde\nlast"},
	} {
		if got := Tail(writeLog(t, c.content), c.skip, c.lines); got != c.want {
			t.Errorf("%.40q: %q, want %q", c.content, got, c.want)
		}
	}
	if got := Tail(writeLog(t, "one\ntwo noise three\nfour\n"), 0, 2, "noise"); got != "one\nfour" {
		t.Errorf("without noise: %q", got)
	}
	if got := Tail("/nonexistent/log", 0, 3); got != "" {
		t.Errorf("of no file: %q", got)
	}
	if got := Tail(writeLog(t, long), 0, 10000); strings.Count(got, "\n") > tailBytes/16 || strings.HasPrefix(got, "abc") {
		t.Errorf("the tail of a long file has %d lines, and begins with %.20q", strings.Count(got, "\n"), got)
	}
}

func FuzzTail(f *testing.F) {
	f.Add([]byte("one\ntwo\x1b[2J\r\n\xff\xfe"), 2)
	f.Fuzz(func(t *testing.T, content []byte, lines int) {
		if lines < 0 || lines > 100 {
			return
		}
		got := Tail(writeLog(t, string(content)), 0, lines)
		if n := strings.Count(got, "\n"); n > max(0, lines-1) {
			t.Errorf("%d lines, want at most %d", n+1, lines)
		}
		for _, r := range got {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("unprintable %q got through", r)
			}
		}
	})
}
