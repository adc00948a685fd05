package ui

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
)

func TestMessages(t *testing.T) {
	var out, errOut bytes.Buffer
	u := New(&out, &errOut)
	u.Error("no such VM: x", "`fcvm ls` lists them")
	u.Error("something", "")
	u.Warn("slow")
	u.Say("paused for %s", Millis(12.345))
	u.Note("not for pipes")
	want := "fcvm: error: no such VM: x\nfcvm: hint: `fcvm ls` lists them\nfcvm: error: something\nfcvm: warning: slow\npaused for 12.3 ms\n"
	if errOut.String() != want || out.Len() > 0 {
		t.Errorf("got %q and %q", errOut.String(), out.String())
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain äöü\n\ttext":    "plain äöü\n\ttext",
		"\x1b[2Jgone":          "\ufffd[2Jgone",
		"line\r\n":             "line\n",
		"\x9b31mred":           "\ufffd31mred", // not UTF-8
		"\u009b31mred":         "\ufffd31mred", // C1 control sequence introducer
		"\u202eevil\u2066":     "\ufffdevil\ufffd",
		"bell\a nul\x00 \x7fx": "bell\ufffd nul\ufffd \ufffdx",
	} {
		if got := Clean(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\x1b[0m\r\nb")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range Clean(s) {
			if (r < ' ' && r != '\n' && r != '\t') || (r >= 0x7f && r <= 0x9f) {
				t.Fatalf("%q leaves %q", s, r)
			}
		}
	})
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := WriteTable(&b, []string{"NAME", "IMAGE"}, [][]string{{"a", "x\ty\nz"}, {"longer", "\x1b[0m"}}); err != nil {
		t.Fatal(err)
	}
	want := "NAME     IMAGE\na        x y z\nlonger   \ufffd[0m\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
	if err := WriteTable(failing{}, []string{"A"}, nil); err == nil {
		t.Error("no error of a writer that fails")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestFormats(t *testing.T) {
	for ms, want := range map[float64]string{0.5: "0.50 ms", 12.34: "12.3 ms", 345.6: "346 ms", 12345: "12.3 s"} {
		if got := Millis(ms); got != want {
			t.Errorf("%v: got %s, want %s", ms, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0B", 1023: "1023B", 1 << 20: "1MiB", 3 << 29: "1.5GiB"} {
		if got := Size(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
	if Age(time.Time{}) != "" || Age(time.Now().Add(-3*time.Minute)) != "3 minutes ago" {
		t.Error(Age(time.Now().Add(-3 * time.Minute)))
	}
	for want, got := range map[string]string{
		"pull  50% of 10B": progressText("pull", 5, 10), "pull 100% of 10B": progressText("pull", 20, 10),
		"pull 5B": progressText("pull", 5, 0), "pull …": progressText("pull", 0, 0),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// Into a pipe or a file goes no progress at all.
func TestProgressIsSilentInPipes(t *testing.T) {
	var b bytes.Buffer
	p := New(io.Discard, &b).Progress()
	p.Set("pulling", 1, 2)
	p.SetCount("clones", 2, 2)
	p.Done()
	if b.Len() > 0 {
		t.Errorf("wrote %q", b.String())
	}
}

// On a terminal the line is redrawn in place, never glued to other text, and
// gone in the end.
func TestProgressOnTerminal(t *testing.T) {
	ptmx, tty, err := pty.Open()
	if err != nil {
		t.Skipf("no pseudo-terminal here: %v", err)
	}
	defer ptmx.Close()
	u := New(io.Discard, tty)
	p := u.Progress()
	p.Set("pulling", 1, 4)
	p.Set("pulling", 4, 4) // the end is always drawn
	u.Warn("careful")
	p.Done()
	p.Done()
	p.Set("after the end", 1, 1)
	u.Note("for people")
	if err := tty.Close(); err != nil {
		t.Fatal(err)
	}
	got, _ := io.ReadAll(ptmx) // EIO once the other side is closed
	want := clearLine + "pulling  25% of 4B" + clearLine + "pulling 100% of 4B" + clearLine + "fcvm: warning: careful\r\n" + clearLine + "for people\r\n"
	if string(got) != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestLive(t *testing.T) {
	var b bytes.Buffer
	u := New(&b, io.Discard)
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	err := u.Live(ctx, time.Millisecond, func(context.Context) (string, error) {
		if n++; n == 3 {
			cancel()
		}
		return "one\ntwo\n", nil
	})
	if err != nil || strings.Count(b.String(), "one\x1b[K\ntwo\x1b[K\n\x1b[J") != 2 || strings.Count(b.String(), "\x1b[2J") != 1 {
		t.Errorf("%v: %q", err, b.String())
	}
	failed := errors.New("lost")
	if err := u.Live(t.Context(), time.Hour, func(context.Context) (string, error) { return "", failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
}

func TestIsTerminal(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if IsTerminal(w) || IsTerminal(&bytes.Buffer{}) || IsTerminal(nil) {
		t.Error("a pipe is no terminal")
	}
}
