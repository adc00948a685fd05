package supervisor

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fcvm/internal/api"
	"fcvm/internal/vmm"
)

func goodRecord() record {
	return record{
		VM:     api.VM{ID: "0123456789ab", Name: "web", State: api.StateRunning},
		Handle: &vmm.Handle{Engine: "fake", PID: 2, Regions: []vmm.Region{{Addr: 4096, Size: 4096}}},
	}
}

func TestRecordSurvives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "0123456789ab")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	want := goodRecord()
	if err := want.save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := loadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, *got); d != "" {
		t.Error(d)
	}
	// A copy of a directory must not become a second VM.
	other := filepath.Join(filepath.Dir(dir), "ba9876543210")
	if err := os.Rename(dir, other); err != nil {
		t.Fatal(err)
	}
	if _, err := loadRecord(other); err == nil {
		t.Error("the record of another VM was accepted")
	}
}

func TestParseRecordRefuses(t *testing.T) {
	for name, change := range map[string]func(r *record){
		"schema":    func(r *record) { r.Schema = 99 },
		"id":        func(r *record) { r.VM.ID = "../../etc" },
		"name":      func(r *record) { r.VM.Name = "a/b" },
		"state":     func(r *record) { r.VM.State = "confused" },
		"no handle": func(r *record) { r.Handle = nil },
		"init":      func(r *record) { r.Handle.PID = 1 },
		"group":     func(r *record) { r.Handle.PID = -5 },
		"region":    func(r *record) { r.Handle.Regions[0].Addr = 1<<64 - 1 },
	} {
		r := goodRecord()
		r.Schema = recordSchema
		change(&r)
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseRecord(b); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	r := goodRecord()
	r.Schema = recordSchema
	b, err := json.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"schema":1,"vm":{"id":"aaaaaaaaaaaa","name":"half","state":"creating"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			return
		}
		if r.Handle != nil && r.Handle.PID <= 1 || strings.Contains(r.VM.ID+r.VM.Name, "/") {
			t.Errorf("accepted %+v", r)
		}
	})
}

// TestUnreadableRecordKeepsTheOthersServed: one damaged file is no reason to
// leave all other VMs without a supervisor.
func TestUnreadableRecordKeepsTheOthersServed(t *testing.T) {
	b := newBench(t)
	vm := b.run("web", "sleep")
	b.end()
	mustWrite(t, b.layout.VM("cccccccccccc"), "{")
	b.start()
	if got, err := b.c.Get(t.Context(), "web"); err != nil || got.ID != vm.ID || got.State != api.StateRunning {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestCutOffStartIsEnded: a supervisor that was killed between the start of a
// VMM and the note of its pid leaves a process that only its command line names.
func TestCutOffStartIsEnded(t *testing.T) {
	b := idleBench(t)
	dir := b.layout.VM("aaaaaaaaaaaa")
	mustWrite(t, dir, `{"schema":1,"vm":{"id":"aaaaaaaaaaaa","name":"half","state":"creating"}}`)
	// A person who looks at the log is no VMM.
	other := exec.Command("sh", "-c", "read x", dir+"/container.log")
	vmm := exec.Command("sh", "-c", "read x", dir+"/container.log")
	vmm.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// One that was started ahead has no record at all.
	unknown := b.layout.VM("bbbbbbbbbbbb")
	mustWrite(t, unknown, "")
	spare := exec.Command("sh", "-c", "read x", unknown+"/container.log")
	spare.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Page servers are started before there is a clone on record.
	orphan := filepath.Join(b.layout.Runtime, serverPrefix+"00000000")
	if err := os.Mkdir(orphan, 0o700); err != nil {
		t.Fatal(err)
	}
	server := exec.Command("sh", "-c", "read x", orphan+"/uffd.sock")
	server.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for _, c := range []*exec.Cmd{other, vmm, spare, server} {
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	b.start()
	for _, c := range []*exec.Cmd{vmm, spare, server} {
		if err := c.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("%v ended with %v", c.Args, err)
		}
	}
	b.clean()
	if err := other.Process.Kill(); err != nil {
		t.Errorf("another process was ended: %v", err)
	}
	_ = other.Wait()
}

func TestGeneratedNames(t *testing.T) {
	for _, a := range adjectives {
		for _, b := range animals {
			if err := checkName(a + "-" + b); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Also when all simple names are taken.
	s := &Supervisor{names: map[string]*machine{}}
	for _, a := range adjectives {
		for _, b := range animals {
			s.names[a+"-"+b] = &machine{}
		}
	}
	if n := s.freeName(); s.names[n] != nil || checkName(n) != nil {
		t.Errorf("name %q", n)
	}
}
