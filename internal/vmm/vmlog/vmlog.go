// Package vmlog reads the ends of the logs of VMs, for error messages.
package vmlog

import (
	"io"
	"os"
	"slices"
	"strings"
	"unicode"
)

// tailBytes is how much of a log's end is looked at.
const tailBytes = 8 << 10

// Tail returns the last lines of a file, as far as they are behind the first skip
// bytes, or nothing where it can't be read. Lines that contain one of noise are left
// out. A guest writes what it likes to its console, so only printable characters get
// through to a terminal.
func Tail(path string, skip int64, lines int, noise ...string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	from := max(skip, info.Size()-tailBytes)
	b, err := io.ReadAll(io.NewSectionReader(f, from, tailBytes))
	if err != nil {
		return ""
	}
	all := strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' || r == '\r' })
	if from > skip && len(all) > 1 {
		all = all[1:] // begins in the middle
	}
	for _, n := range noise {
		all = slices.DeleteFunc(all, func(l string) bool { return strings.Contains(l, n) })
	}
	all = all[max(0, len(all)-lines):]
	for i, l := range all {
		all[i] = strings.TrimSpace(strings.Map(printable, l))
	}
	return strings.TrimSpace(strings.Join(all, "\n"))
}

func printable(r rune) rune {
	switch {
	case r == '\t':
		return ' '
	case r == unicode.ReplacementChar || !unicode.IsPrint(r):
		return -1
	}
	return r
}
