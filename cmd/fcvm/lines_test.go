//go:build linux

package main

import (
	"bufio"
	"io"
	"strings"
	"testing"
)

// lines reads what a command prints, line by line.
type lines struct {
	r    io.Reader
	sc   *bufio.Scanner
	seen []string
}

func newLines(r io.Reader) *lines { return &lines{r: r, sc: bufio.NewScanner(r)} }

func (l *lines) next(t *testing.T) string {
	t.Helper()
	if !l.sc.Scan() {
		t.Fatalf("output ended after %q: %v", l.seen, l.sc.Err())
	}
	line := strings.TrimRight(l.sc.Text(), "\r")
	l.seen = append(l.seen, line)
	return line
}

// until skips lines up to one that contains want.
func (l *lines) until(t *testing.T, want string) {
	t.Helper()
	for !strings.Contains(l.next(t), want) {
	}
}
