//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/memmap"
	"fcvm/internal/ui"
)

// mapOptions are the flags of map and snapshot map.
type mapOptions struct {
	out  string
	json bool
}

func (o *mapOptions) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.out, "output", "o", "", "write a picture (PNG) to `FILE`, - for standard output")
	cmd.Flags().BoolVar(&o.json, "json", false, "print the counts as JSON")
}

// mapCounts is the schema of map --json and snapshot map --json.
type mapCounts struct {
	Version int `json:"version"`
	// VM is empty for a map of a snapshot, Snapshot for one of a VM that is no clone.
	VM          string       `json:"vm,omitempty"`
	Snapshot    string       `json:"snapshot,omitempty"`
	PageBytes   int64        `json:"page_bytes"`
	Pages       int          `json:"pages"`
	MemoryBytes int64        `json:"memory_bytes"`
	States      []stateCount `json:"states"`
}

type stateCount struct {
	State string `json:"state"`
	Pages int64  `json:"pages"`
	Bytes int64  `json:"bytes"`
	// WorkingSetPages of Pages are in the working set; missing where none is known.
	WorkingSetPages *int64 `json:"working_set_pages,omitempty"`
}

// checkMap refuses what cannot be done, before the work.
func (a *app) checkMap(o mapOptions) error {
	switch {
	case o.out != "-":
		return nil
	case o.json:
		return invalid("--json and -o - both want standard output")
	case ui.IsTerminal(a.ui.Out):
		return &usageError{message: "refusing to write a picture to a terminal", hint: "name a file with -o, or pipe it on"}
	}
	return nil
}

// showMap writes the picture where one is wanted, and prints the counts unless
// standard output has the picture.
func (a *app) showMap(vm, snapshot string, m *memmap.Map, o mapOptions) error {
	if err := m.Check(); err != nil {
		return err
	}
	if o.out != "" {
		var b bytes.Buffer
		if err := m.WritePNG(&b); err != nil {
			return err
		}
		if o.out == "-" {
			if _, err := a.ui.Out.Write(b.Bytes()); err != nil {
				return fmt.Errorf("write picture: %w", err)
			}
			return nil
		}
		if err := writePicture(o.out, b.Bytes()); err != nil {
			return err
		}
	}
	counts := m.Counts()
	if o.json {
		c := mapCounts{
			Version: api.SchemaVersion, VM: vm, Snapshot: snapshot, PageBytes: m.PageBytes, Pages: len(m.Pages), MemoryBytes: m.Bytes(),
		}
		for _, n := range counts {
			s := stateCount{State: n.State.String(), Pages: n.Pages, Bytes: n.Pages * m.PageBytes}
			if m.WorkingSet {
				s.WorkingSetPages = &n.WorkingSet
			}
			c.States = append(c.States, s)
		}
		return a.ui.JSON(c)
	}
	header := []string{"STATE", "PAGES", "SIZE", "PERCENT"}
	if m.WorkingSet {
		header = append(header, "IN WORKING SET")
	}
	rows := make([][]string, 0, len(counts))
	for _, n := range counts {
		row := []string{
			n.State.String(), strconv.FormatInt(n.Pages, 10), ui.Size(n.Pages * m.PageBytes),
			fmt.Sprintf("%.1f", 100*float64(n.Pages)/float64(max(1, len(m.Pages)))),
		}
		if m.WorkingSet {
			row = append(row, strconv.FormatInt(n.WorkingSet, 10))
		}
		rows = append(rows, row)
	}
	return a.ui.Table(header, rows)
}

// writePicture leaves no half of a file behind. What was there before, such as a
// device, stays.
func writePicture(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return fmt.Errorf("write picture: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		return nil
	}
	if fi, serr := os.Lstat(path); serr == nil && fi.Mode().IsRegular() {
		err = errors.Join(err, os.Remove(path))
	}
	return fmt.Errorf("write picture: %w", err)
}
