//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"fcvm/internal/datadir"
	"fcvm/internal/pagesum"
	"fcvm/internal/snapshot"
	"fcvm/internal/workingset"
)

// snapshotPages is the guest memory of the snapshots that tests make.
const snapshotPages = 1024

// makeSnapshot makes one whose memory holds data in these pages, and zeros else.
func makeSnapshot(t *testing.T, l *datadir.Layout, name string, data ...int64) *snapshot.Snapshot {
	t.Helper()
	store, err := snapshot.Open(l.Snapshots())
	if err != nil {
		t.Fatal(err)
	}
	const size = snapshotPages * pagesum.PageSize
	snap, err := store.Create(t.Context(), name, func(ctx context.Context, d *snapshot.Draft) (snapshot.Manifest, error) {
		m := snapshot.Manifest{
			VM:      "golden",
			Image:   snapshot.Image{Ref: "nginx:latest", ID: "sha256:abc"},
			Engine:  snapshot.Engine{Name: "qemu", Version: "7.2.22", Accel: "tcg", CPU: "max"},
			Machine: snapshot.Machine{MemoryBytes: size, CPUs: 1},
			Regions: []snapshot.MemRegion{{Offset: 0, Size: size}},
		}
		mem, err := d.CreateMemory(ctx, size, nil)
		if err != nil {
			return m, err
		}
		for _, page := range data {
			if _, err := mem.WriteAt(bytes.Repeat([]byte{7}, pagesum.PageSize), page*pagesum.PageSize); err != nil {
				return m, err
			}
		}
		return m, os.WriteFile(d.StatePath(), []byte("device state"), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// record writes a working set of these pages.
func record(t *testing.T, snap *snapshot.Snapshot, cold, warm workingset.Tally, pages ...int64) {
	t.Helper()
	id, err := snap.WorkingSetID()
	if err != nil {
		t.Fatal(err)
	}
	set := workingset.New(id, snapshotPages)
	for _, p := range pages {
		set.Add(p)
	}
	set.Cold, set.Warm = cold, warm
	if err := os.WriteFile(snap.WorkingSet(), set.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSnapshotTellsOfItsWorkingSet(t *testing.T) {
	l := newLayout(t)
	snap := makeSnapshot(t, l, "base", 1, 2)
	inspect := func() *workingSetInfo {
		t.Helper()
		r := fcvm(t, l, "", "snapshot", "inspect", "base")
		var d snapshotDetails
		if err := json.Unmarshal([]byte(r.out), &d); err != nil || r.code != 0 {
			t.Fatal(err, r)
		}
		return d.WorkingSet
	}
	verify := func(want string) {
		t.Helper()
		r := fcvm(t, l, "", "snapshot", "verify", "base")
		if ok, err := regexp.MatchString(want, strings.TrimSpace(r.out)); err != nil || !ok || r.code != 0 {
			t.Errorf("want %s, got %v", want, r)
		}
	}
	if ws := inspect(); ws != nil {
		t.Errorf("nothing was recorded, and it tells %+v", ws)
	}
	verify(`^base: all checksums match$`)

	record(t, snap, workingset.Tally{Sessions: 1, Faults: 100}, workingset.Tally{}, 1, 2, 3)
	if ws := inspect(); ws == nil || ws.Pages != 3 || ws.Bytes != 3*4096 || ws.HitRate != nil || *ws.Cold != (recorded{1, 100}) || ws.Error != "" {
		t.Errorf("got %+v", ws)
	}
	verify(`^base: all checksums match; working set: 3 pages \(12KiB\)$`)

	record(t, snap, workingset.Tally{Sessions: 2, Faults: 100}, workingset.Tally{Sessions: 4, Faults: 20}, 1)
	if ws := inspect(); ws == nil || ws.HitRate == nil || *ws.HitRate != 0.9 || *ws.Warm != (recorded{4, 20}) {
		t.Errorf("got %+v", ws)
	}

	if err := os.WriteFile(snap.WorkingSet(), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ws := inspect(); ws == nil || ws.Pages != 0 || !strings.Contains(ws.Error, "unusable") {
		t.Errorf("got %+v", ws)
	}
	verify(`^base: all checksums match; working set is unusable: .* \(this costs speed only\)$`)
	r := fcvm(t, l, "", "snapshot", "verify", "--json", "base")
	if !strings.Contains(r.out, `"ok": true`) || !strings.Contains(r.out, "unusable") {
		t.Error(r)
	}
	if r := fcvm(t, l, "", "snapshot", "rm", "base"); r.code != 0 {
		t.Error(r)
	}
}
