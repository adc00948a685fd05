package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"fcvm/internal/pagesum"
)

func encoded(t testing.TB) []byte {
	t.Helper()
	m := testManifest()
	m.Schema, m.Name, m.Created = SchemaVersion, "base", time.Now()
	sum := strings.Repeat("ab", 32)
	m.Files = []File{{memoryFile, testMemory, sum}, {stateFile, 12, sum}, {sumsFile, pagesum.FileSize(testMemory / pageSize), sum}}
	b, err := m.encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseManifest(t *testing.T) {
	m, err := ParseManifest(bytes.NewReader(encoded(t)))
	if err != nil {
		t.Fatal(err)
	}
	want := testManifest()
	if !reflect.DeepEqual(m.Regions, want.Regions) || !reflect.DeepEqual(m.Container.Command, want.Container.Command) {
		t.Errorf("got %+v", m)
	}
}

func TestParseManifestRefuses(t *testing.T) {
	good := encoded(t)
	sub := func(old, new string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("manifest has no %s", old)
		}
		return bytes.Replace(good, []byte(old), []byte(new), 1)
	}
	for name, b := range map[string][]byte{
		"empty":         nil,
		"cut":           good[:len(good)/2],
		"trailing":      append(bytes.Clone(good), "{}"...),
		"unknown field": sub(`"name"`, `"x": 1, "name"`),
		"value":         sub(`"cpus": 1`, `"cpus": 2`),
		"huge":          append(bytes.Repeat([]byte(" "), maxManifest), good...),
		"not an object": []byte(`[]`),
	} {
		if _, err := ParseManifest(bytes.NewReader(b)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, schema := range map[string]string{"newer": "3", "older": "1"} {
		_, err := ParseManifest(bytes.NewReader(sub(`"schema": 2`, `"schema": `+schema)))
		if err == nil || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "schema "+schema) || !strings.Contains(err.Error(), "use the fcvm that made") {
			t.Errorf("%s schema: %v", name, err)
		}
	}
}

// TestCheckRefuses has manifests whose sum is right, and which make no sense.
func TestCheckRefuses(t *testing.T) {
	for name, edit := range map[string]func(*Manifest){
		"name":            func(m *Manifest) { m.Name = "../x" },
		"parent":          func(m *Manifest) { m.Parent = "a/b" },
		"no image":        func(m *Manifest) { m.Image.ID = "" },
		"no engine":       func(m *Manifest) { m.Engine.Name = "" },
		"cpus":            func(m *Manifest) { m.Machine.CPUs = 0 },
		"memory":          func(m *Manifest) { m.Machine.MemoryBytes = -4096 },
		"much memory":     func(m *Manifest) { m.Machine.MemoryBytes = 1 << 50 },
		"no regions":      func(m *Manifest) { m.Regions = nil },
		"region gap":      func(m *Manifest) { m.Regions[1].Offset += pageSize },
		"region overlap":  func(m *Manifest) { m.Regions[1].Offset -= pageSize },
		"region overflow": func(m *Manifest) { m.Regions[1].Size = 1<<63 - 4096 },
		"region short":    func(m *Manifest) { m.Regions[1].Size -= pageSize },
		"region uneven":   func(m *Manifest) { m.Regions[0].Size = 100; m.Regions[1].Offset = 100 },
		"files":           func(m *Manifest) { m.Files = m.Files[:1] },
		"file name":       func(m *Manifest) { m.Files[0].Name = "../mem.img" },
		"file size":       func(m *Manifest) { m.Files[0].Size-- },
		"file sum":        func(m *Manifest) { m.Files[1].Sum = "xyz" },
		"no page sums":    func(m *Manifest) { m.Files = m.Files[:2] },
		"page sums' size": func(m *Manifest) { m.Files[2].Size++ },
	} {
		m, err := ParseManifest(bytes.NewReader(encoded(t)))
		if err != nil {
			t.Fatal(err)
		}
		edit(m)
		b, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseManifest(bytes.NewReader(b)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzManifest holds the parser to this: what it takes it writes back so that it
// takes it again, and names no file outside the snapshot.
func FuzzManifest(f *testing.F) {
	f.Add(encoded(f))
	f.Add([]byte(`{"schema":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		// A fuzzer cannot guess sums; give it right ones.
		for _, b := range [][]byte{b, resum(b)} {
			m, err := ParseManifest(bytes.NewReader(b))
			if err != nil {
				continue
			}
			if CheckName(m.Name) != nil || len(m.Files) != 3 || m.Files[0].Name != memoryFile {
				t.Errorf("took %+v", m)
			}
			again, err := m.encode()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseManifest(bytes.NewReader(again)); err != nil {
				t.Errorf("took %s, but not what it wrote of it: %v", b, err)
			}
		}
	})
}

func resum(b []byte) []byte {
	var m Manifest
	if json.Unmarshal(b, &m) != nil {
		return nil
	}
	out, err := m.encode()
	if err != nil {
		return nil
	}
	return out
}

func TestNearest(t *testing.T) {
	names := []string{"nginx-base", "redis", "a"}
	for want, near := range map[string]string{"nginx-bas": "nginx-base", "reids": "redis", "b": "", "postgres": "", "": ""} {
		if got := nearest(want, names); got != near {
			t.Errorf("nearest(%q) = %q, want %q", want, got, near)
		}
	}
	if got := distance("kitten", "sitting"); got != 3 {
		t.Errorf("distance = %d", got)
	}
}
