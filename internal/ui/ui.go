// Package ui is how fcvm speaks. Its rules:
//
//   - Standard output is for results: names, tables, JSON. All else goes to
//     standard error, so that results can be piped.
//   - "fcvm: error: …" says in one sentence what is wrong, lower case, without a
//     full stop. "fcvm: hint: …" follows with the next command to type, where
//     there is one. "fcvm: warning: …" is for what goes on, but otherwise than was
//     asked for.
//   - Progress and notes about speed are for people: nothing of it is written
//     when standard error is no terminal.
//   - Text that a guest, a registry or a file may have chosen is shown without
//     control characters ([Clean]): it can't move the cursor or fake a prompt.
//   - Sizes are in bytes in JSON, and in binary units (KiB, MiB) in tables.
package ui

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"unicode"

	"golang.org/x/term"
)

// UI writes to one pair of standard output and standard error. Its methods may
// be called concurrently.
type UI struct {
	Out io.Writer
	Err io.Writer

	mu       sync.Mutex
	progress *Progress // guarded by mu; the line at the cursor, to be cleared before other text
}

// New returns a UI on the two writers, which are usually os.Stdout and os.Stderr.
func New(out, err io.Writer) *UI { return &UI{Out: out, Err: err} }

// IsTerminal tells whether w is a terminal.
func IsTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Error says what went wrong, and what to do about it when hint is not empty.
func (u *UI) Error(message, hint string) {
	u.line("error", message)
	if hint != "" {
		u.Hint(hint)
	}
}

// Hint says what to type next.
func (u *UI) Hint(message string) { u.line("hint", message) }

// Warn says what goes on otherwise than was asked for.
func (u *UI) Warn(message string) { u.line("warning", message) }

// Say writes a fact that belongs to the command but is not its result, such as
// for how long a VM was paused.
func (u *UI) Say(format string, args ...any) {
	u.write(Clean(fmt.Sprintf(format, args...)) + "\n")
}

// Note is Say for people: it is silent when standard error is no terminal.
func (u *UI) Note(format string, args ...any) {
	if IsTerminal(u.Err) {
		u.Say(format, args...)
	}
}

func (u *UI) line(kind, text string) {
	u.write("fcvm: " + kind + ": " + Clean(text) + "\n")
}

func (u *UI) write(s string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.progress != nil {
		s = clearLine + s
	}
	fmt.Fprint(u.Err, s)
}

// JSON writes v, indented, as a result.
func (u *UI) JSON(v any) error { return writeJSON(u.Out, v) }

// ErrorJSON writes v to standard error.
func (u *UI) ErrorJSON(v any) { _ = writeJSON(u.Err, v) }

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print JSON: %w", err)
	}
	return nil
}

// Println writes a line of results.
func (u *UI) Println(s string) error {
	if _, err := fmt.Fprintln(u.Out, s); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// Table writes aligned columns as a result.
func (u *UI) Table(header []string, rows [][]string) error {
	return WriteTable(u.Out, header, rows)
}

// WriteTable writes aligned columns to w. Cells are cleaned ([Clean]); a tab or
// a line break in one becomes a space.
func WriteTable(w io.Writer, header []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, strings.Join(header, "\t"))
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = strings.Join(strings.FieldsFunc(Clean(c), func(r rune) bool { return r == '\n' || r == '\t' }), " ")
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return fmt.Errorf("print table: %w", err)
	}
	return nil
}

// Clean returns s with every control character but newline and tab replaced by
// U+FFFD, and so with every character that turns the direction of text.
func Clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return r
		case r == '\r':
			return -1 // a serial console's line ends
		case unicode.IsControl(r), unicode.In(r, unicode.Bidi_Control), r == '\u2028', r == '\u2029':
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
