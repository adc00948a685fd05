//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"

	"fcvm/internal/pagesum"
	"fcvm/internal/snapshot"
	"fcvm/internal/ui"
	"fcvm/internal/workingset"
)

// workingSetInfo is what commands tell of a snapshot's working set.
type workingSetInfo struct {
	Pages int64 `json:"pages"`
	Bytes int64 `json:"bytes"`
	// HitRate is the part of a clone's waits for memory that the working set saves,
	// 0 to 1; missing before it is known.
	HitRate *float64 `json:"hit_rate,omitempty"`
	// Cold clones got nothing before they asked, warm ones got the working set.
	Cold *recorded `json:"cold,omitempty"`
	Warm *recorded `json:"warm,omitempty"`
	// Error says why it is unusable; all else is 0 then.
	Error string `json:"error,omitempty"`
}

// recorded counts clones, and the page faults that they waited for while they
// were recorded.
type recorded struct {
	Clones uint64 `json:"clones"`
	Faults uint64 `json:"faults"`
}

// describeWorkingSet returns nil where nothing was recorded.
func describeWorkingSet(s *snapshot.Snapshot) *workingSetInfo {
	set, err := s.ReadWorkingSet()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return &workingSetInfo{Error: err.Error()}
	}
	n := set.Count()
	w := &workingSetInfo{Pages: n, Bytes: n * pagesum.PageSize, Cold: tally(set.Cold), Warm: tally(set.Warm)}
	if rate, ok := set.HitRate(); ok {
		w.HitRate = &rate
	}
	return w
}

func tally(t workingset.Tally) *recorded { return &recorded{t.Sessions, t.Faults} }

// note is what a line about the snapshot ends with.
func (w *workingSetInfo) note() string {
	switch {
	case w == nil:
		return ""
	case w.Error != "":
		return "; " + w.Error + " (this costs speed only)"
	}
	return fmt.Sprintf("; working set: %s (%s)", plural(int(w.Pages), "page"), ui.Size(w.Bytes))
}
