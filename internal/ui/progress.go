package ui

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/go-units"
)

const (
	clearLine = "\r\x1b[K"
	// redraw bounds how often a progress line is drawn: a terminal over a slow
	// link must not slow down what is being shown.
	redraw = 100 * time.Millisecond
)

// Progress is one line at the cursor that tells how far something is. Where
// standard error is no terminal it does nothing. It is not safe for concurrent
// use.
type Progress struct {
	u    *UI
	last time.Time
}

// Progress begins a progress line. Call Done before writing results.
func (u *UI) Progress() *Progress {
	p := &Progress{u: u}
	if IsTerminal(u.Err) {
		u.mu.Lock()
		u.progress = p
		u.mu.Unlock()
	}
	return p
}

// Set shows what is being done, and how far: done of total bytes, where total is
// 0 when nobody knows.
func (p *Progress) Set(what string, done, total int64) {
	p.u.mu.Lock()
	defer p.u.mu.Unlock()
	if p.u.progress != p || (time.Since(p.last) < redraw && done != total) {
		return
	}
	p.last = time.Now()
	fmt.Fprint(p.u.Err, clearLine+Clean(progressText(what, done, total)))
}

func progressText(what string, done, total int64) string {
	switch {
	case total > 0:
		return fmt.Sprintf("%s %3d%% of %s", what, 100*min(done, total)/total, Size(total))
	case done > 0:
		return fmt.Sprintf("%s %s", what, Size(done))
	}
	return what + " …"
}

// Done clears the line. It is idempotent.
func (p *Progress) Done() {
	p.u.mu.Lock()
	defer p.u.mu.Unlock()
	if p.u.progress == p {
		p.u.progress = nil
		fmt.Fprint(p.u.Err, clearLine)
	}
}

// Size formats bytes for a person: "1.5MiB".
func Size(n int64) string { return units.CustomSize("%.4g%s", float64(n), 1024, sizes()) }

func sizes() []string { return []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"} }

// Age formats how long ago t was: "3 minutes ago".
func Age(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

// Millis formats a duration in milliseconds with three digits: "12.3 ms".
func Millis(ms float64) string {
	switch {
	case ms >= 10000:
		return fmt.Sprintf("%.1f s", ms/1000)
	case ms >= 100:
		return fmt.Sprintf("%.0f ms", ms)
	case ms >= 10:
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.2f ms", ms)
}

// Live redraws the terminal with what draw returns, now and every interval, until
// ctx ends or draw fails. When ctx ends the last picture stays and the error is
// nil.
func (u *UI) Live(ctx context.Context, interval time.Duration, draw func(context.Context) (string, error)) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for first := true; ; first = false {
		text, err := draw(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		// Over what was there before, then clear the rest: less flicker than
		// clearing first.
		head := "\x1b[H"
		if first {
			head = "\x1b[2J\x1b[H"
		}
		if _, err := fmt.Fprint(u.Out, head+lineEnds(text)+"\x1b[J"); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// lineEnds clears each line's rest before its end.
func lineEnds(s string) string {
	out := make([]byte, 0, len(s)+64)
	for i := range len(s) {
		if s[i] == '\n' {
			out = append(out, "\x1b[K"...)
		}
		out = append(out, s[i])
	}
	return string(out)
}

// SetCount is Set for things that are counted: n of total.
func (p *Progress) SetCount(what string, n, total int) {
	p.u.mu.Lock()
	defer p.u.mu.Unlock()
	if p.u.progress != p || (time.Since(p.last) < redraw && n != total) {
		return
	}
	p.last = time.Now()
	fmt.Fprintf(p.u.Err, "%s%s %d of %d", clearLine, Clean(what), n, total)
}
