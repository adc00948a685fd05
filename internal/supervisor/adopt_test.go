package supervisor

import (
	"os"
	"strings"
	"testing"

	"fcvm/internal/api"
)

func TestReadoption(t *testing.T) {
	b := newBench(t)
	golden := b.golden()
	clone := b.clone(api.CloneRequest{Snapshot: "snap", Name: "clone", Env: []string{"A=1"}})[0]
	paused := b.run("paused", "sleep")
	if err := b.c.Pause(t.Context(), "paused"); err != nil {
		t.Fatal(err)
	}
	dies := b.run("dies", "sleep")
	crashes := b.run("crashes", "sleep")
	over := b.run("over", "exit", "2")
	if _, err := b.c.Wait(t.Context(), "over"); err != nil {
		t.Fatal(err)
	}
	v := b.engine.byID(t, dies.ID)
	w := b.engine.byID(t, crashes.ID)
	g := b.engine.byID(t, golden.ID)

	b.end()
	v.exit(6)
	w.end()
	// A supervisor that dies in a snapshot leaves its VM paused.
	if err := g.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Halves of a start: with and without a first record.
	mustWrite(t, b.layout.VM("aaaaaaaaaaaa"), `{"schema":1,"vm":{"id":"aaaaaaaaaaaa","name":"half","state":"creating"}}`)
	mustWrite(t, b.layout.VM("bbbbbbbbbbbb"), "")
	b.start()

	for _, vm := range []api.VM{golden, clone} {
		got, err := b.c.Get(t.Context(), vm.Name)
		if err != nil || got.State != api.StateRunning || got.ID != vm.ID {
			t.Errorf("%s: %+v, %v", vm.Name, got, err)
		}
		if _, code := b.exec(vm.Name, "true"); code != 5 {
			t.Errorf("exec in %s: %d", vm.Name, code)
		}
	}
	if got, _ := b.c.Get(t.Context(), "paused"); got.State != api.StatePaused || !b.engine.byID(t, paused.ID).isPaused() {
		t.Errorf("paused: %+v", got)
	}
	if err := b.c.Resume(t.Context(), "paused"); err != nil {
		t.Error(err)
	}
	if got, _ := b.c.Wait(t.Context(), "dies"); got.ExitCode != 6 || got.Error != "" {
		t.Errorf("one that died meanwhile: %+v", got)
	}
	if got, _ := b.c.Wait(t.Context(), "crashes"); got.Error == "" {
		t.Errorf("one that crashed meanwhile: %+v", got)
	}
	if got, _ := b.c.Wait(t.Context(), "over"); got.ExitCode != 2 {
		t.Errorf("one that had ended before: %+v", got)
	}
	if _, err := b.c.Get(t.Context(), "half"); err == nil {
		t.Error("half a start is there")
	}
	if b.servers.launched != 1 {
		t.Errorf("%d page servers launched", b.servers.launched)
	}
	second := b.clone(api.CloneRequest{Snapshot: "snap", Name: "second"})[0]
	if b.servers.launched != 1 {
		t.Error("an adopted page server is not used")
	}
	b.clean(golden, clone, paused, dies, crashes, over, second)
	for _, n := range []string{"clone", "second"} {
		if err := b.c.Remove(t.Context(), n, true); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(b.servers.running()); n != 0 {
		t.Errorf("%d page servers are left", n)
	}
}

// TestReadoptionWithoutPageServer: a clone whose page server died while nobody
// looked would wait for its memory for ever.
func TestReadoptionWithoutPageServer(t *testing.T) {
	b := newBench(t)
	b.golden()
	b.clone(api.CloneRequest{Snapshot: "snap", Name: "clone"})
	b.end()
	for _, p := range b.servers.running() {
		_ = p.Stop(t.Context())
	}
	b.start()
	if got, err := b.c.Wait(t.Context(), "clone"); err != nil || !strings.Contains(got.Error, "page server") {
		t.Errorf("%+v, %v", got, err)
	}
}

func mustWrite(t testing.TB, dir, state string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if state == "" {
		return
	}
	if err := os.WriteFile(statePath(dir), []byte(state), 0o600); err != nil {
		t.Fatal(err)
	}
}
