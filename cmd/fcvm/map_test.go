//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"

	"fcvm/internal/api"
	"fcvm/internal/memmap"
	"fcvm/internal/workingset"
)

func counts(t *testing.T, r result) mapCounts {
	t.Helper()
	var c mapCounts
	if err := json.Unmarshal([]byte(r.out), &c); err != nil || r.code != 0 {
		t.Fatal(err, r)
	}
	return c
}

// wantPicture decodes a picture; what is in it is the business of internal/memmap.
func wantPicture(t *testing.T, b []byte) {
	t.Helper()
	img, err := png.Decode(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("%v: %.100q", err, b)
	}
	if s := img.Bounds().Size(); s.X < 100 || s.Y < 100 {
		t.Errorf("picture of %v", s)
	}
}

func TestSnapshotMap(t *testing.T) {
	l := newLayout(t)
	snap := makeSnapshot(t, l, "base", 1, 2, 1000)
	c := counts(t, fcvm(t, l, "", "snapshot", "map", "base", "--json"))
	if c.Snapshot != "base" || c.VM != "" || c.Pages != snapshotPages || c.MemoryBytes != snapshotPages*4096 ||
		c.States[0] != (stateCount{"data", 3, 3 * 4096, nil}) || c.States[1].Pages != snapshotPages-3 {
		t.Errorf("got %+v", c)
	}

	record(t, snap, workingset.Tally{}, workingset.Tally{}, 2, 3)
	file := filepath.Join(t.TempDir(), "map.png")
	r := fcvm(t, l, "", "snapshot", "map", "base", "-o", file)
	if r.code != 0 || !strings.Contains(r.out, "IN WORKING SET") || strings.Join(strings.Fields(strings.Split(r.out, "\n")[1]), " ") != "data 3 12KiB 0.3 1" {
		t.Error(r)
	}
	saved, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	wantPicture(t, saved)
	if r := fcvm(t, l, "", "snapshot", "map", "base", "-o", "-"); r.out != string(saved) || r.errOut != "" {
		t.Error("standard output has another picture, or more")
	}

	if err := os.WriteFile(snap.WorkingSet(), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	r = fcvm(t, l, "", "snapshot", "map", "base", "--json")
	if c := counts(t, r); c.States[0].WorkingSetPages != nil || !strings.HasPrefix(r.errOut, "fcvm: warning: working set is unusable") {
		t.Error(r)
	}
}

func TestMapOfAVM(t *testing.T) {
	f := &fake{}
	l := startFake(t, f)
	f.vms["1"] = &fakeVM{VM: api.VM{ID: "1", Name: "web"}}
	const in = memmap.InWorkingSet
	f.memory = api.MemoryMap{
		VM: "web", Snapshot: "base", PageBytes: 4096, WorkingSet: true,
		Pages: []memmap.Page{memmap.Untouched, memmap.Shared, memmap.Shared | in, memmap.Private | in, memmap.Zero, memmap.Untouched | in},
	}
	file := filepath.Join(t.TempDir(), "map.png")
	c := counts(t, fcvm(t, l, "", "map", "web", "--json", "-o", file))
	var got []string
	for _, s := range c.States {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(b))
	}
	want := `{"state":"shared","pages":2,"bytes":8192,"working_set_pages":1}
{"state":"private","pages":1,"bytes":4096,"working_set_pages":1}
{"state":"zero","pages":1,"bytes":4096,"working_set_pages":0}
{"state":"untouched","pages":2,"bytes":8192,"working_set_pages":1}`
	if strings.Join(got, "\n") != want || c.VM != "web" || c.Snapshot != "base" {
		t.Errorf("got %+v", c)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	wantPicture(t, b)

	f.memory.WorkingSet, f.memory.Warning = false, "working set is unusable: it is empty"
	f.memory.Pages = []memmap.Page{memmap.Shared}
	r := fcvm(t, l, "", "map", "web")
	if r.code != 0 || strings.Contains(r.out, "WORKING") || r.errOut != "fcvm: warning: working set is unusable: it is empty\n" {
		t.Error(r)
	}
	// A supervisor that answers nonsense is not drawn.
	f.memory.Pages = []memmap.Page{0x55}
	if r := fcvm(t, l, "", "map", "web"); r.code != exitError || !strings.Contains(r.errOut, "page 0 is 0x55") {
		t.Error(r)
	}
}

func TestMapErrors(t *testing.T) {
	f := &fake{}
	l := startFake(t, f)
	makeSnapshot(t, l, "base", 1)
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		code int
		word string
	}{
		{[]string{"map", "nobody"}, exitNotFound, "no such VM: nobody"},
		{[]string{"map"}, exitInvalid, "missing VM"},
		{[]string{"map", "a", "b"}, exitInvalid, "unexpected argument"},
		{[]string{"snapshot", "map", "bse"}, exitNotFound, "did you mean base?"},
		{[]string{"snapshot", "map"}, exitInvalid, "missing snapshot"},
		{[]string{"snapshot", "map", "base", "--json", "-o", "-"}, exitInvalid, "both want standard output"},
		{[]string{"snapshot", "map", "base", "-o", dir}, exitError, "write picture"},
		{[]string{"snapshot", "map", "base", "-o", dir + "/no/map.png"}, exitError, "write picture"},
		{[]string{"snapshot", "map", "base", "-o", "/dev/full"}, exitUnavailable, "no space left"},
	} {
		r := fcvm(t, l, "", c.args...)
		if r.code != c.code || !strings.Contains(r.errOut, c.word) || r.out != "" {
			t.Errorf("%v: %v", c.args, r)
		}
	}
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Errorf("a device was removed: %v", err)
	}
}

func TestMapRefusesATerminal(t *testing.T) {
	l := newLayout(t)
	makeSnapshot(t, l, "base", 1)
	cmd := command(t, l, "snapshot", "map", "base", "-o", "-")
	tty, err := pty.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	out, _ := io.ReadAll(tty) // EIO when the program has ended
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != exitInvalid || !strings.Contains(string(out), "refusing to write a picture to a terminal") {
		t.Errorf("%v: %q", err, out)
	}
}
