package agent_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/guesttest"
	"fcvm/internal/guest/proto"
)

func TestIdentify(t *testing.T) {
	g := guesttest.Start(t)
	if err := os.WriteFile(filepath.Join(g.Etc, "hosts"), []byte("127.0.0.1 localhost\n10.0.2.15\tgolden\n10.0.0.9 db"), 0o644); err != nil {
		t.Fatal(err)
	}
	id := proto.Identity{
		Hostname: "web-3", MachineID: strings.Repeat("0a", 16),
		Entropy: bytes.Repeat([]byte{7}, 32), Wall: time.Unix(1_800_000_000, 0),
	}
	// As in a clone: the snapshot was taken while the golden VM's host was quiet.
	golden := g.Connect(t)
	if err := golden.Quiesce(timeout(t)); err != nil {
		t.Fatal(err)
	}
	c := agent.New(g.Port.Clone())
	if err := c.Identify(timeout(t), id); err != nil {
		t.Fatal(err)
	}
	if got, want := g.System.Calls(), []string{"entropy", "clock", "hostname"}; !slices.Equal(got, want) {
		t.Errorf("calls = %v, want %v", got, want)
	}
	got := g.System.Identity()
	if !bytes.Equal(got.Entropy, id.Entropy) || !got.Wall.Equal(id.Wall) || got.Hostname != id.Hostname {
		t.Errorf("identity = %+v", got)
	}
	for name, want := range map[string]string{
		"hostname":   "web-3\n",
		"machine-id": id.MachineID + "\n",
		"hosts":      "127.0.0.1 localhost\n10.0.0.9 db\n10.0.2.15\tweb-3\n",
	} {
		b, err := os.ReadFile(filepath.Join(g.Etc, name))
		if err != nil || string(b) != want {
			t.Errorf("%s = %q, %v; want %q", name, b, err, want)
		}
	}
	c.Close()
	for name, bad := range map[string]proto.Identity{
		"host name":  {Hostname: "a b"},
		"path":       {Hostname: "../x/y"},
		"machine id": {MachineID: "ABC"},
	} {
		var refused *agent.Error
		c := agent.New(g.Port.Dial())
		if err := c.Identify(timeout(t), bad); !errors.As(err, &refused) {
			t.Errorf("a bad %s: %v, want an error of the agent", name, err)
		}
		c.Close()
	}
}

// The clock can be set once more, and nothing else is touched then.
func TestIdentifyClockAgain(t *testing.T) {
	g := guesttest.Start(t)
	golden := g.Connect(t)
	if err := golden.Quiesce(timeout(t)); err != nil {
		t.Fatal(err)
	}
	c := agent.New(g.Port.Clone())
	defer c.Close()
	later := time.Unix(1_800_000_001, 0)
	for _, id := range []proto.Identity{{Hostname: "web-1", Entropy: make([]byte, 32), Wall: time.Unix(1_800_000_000, 0)}, {Wall: later}} {
		if err := c.Identify(timeout(t), id); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := g.System.Calls(), []string{"entropy", "clock", "hostname", "clock"}; !slices.Equal(got, want) {
		t.Errorf("calls = %v, want %v", got, want)
	}
	if got := g.System.Identity(); !got.Wall.Equal(later) || got.Hostname != "web-1" {
		t.Errorf("identity = %+v", got)
	}
	info, err := c.Info(timeout(t))
	if err != nil || info.Hostname != "web-1" {
		t.Errorf("Info = %+v, %v", info, err)
	}
}

// A clone's connection serves requests after it got its identity, and a second
// identity on it is refused.
func TestRequestAfterIdentify(t *testing.T) {
	g := guesttest.Start(t)
	golden := g.Connect(t)
	if err := golden.Quiesce(timeout(t)); err != nil {
		t.Fatal(err)
	}
	c := agent.New(g.Port.Clone())
	defer c.Close()
	if err := c.Identify(timeout(t), proto.Identity{Hostname: "web-1"}); err != nil {
		t.Fatal(err)
	}
	info, err := c.Info(timeout(t))
	if err != nil || info.Hostname != "web-1" {
		t.Errorf("Info = %+v, %v", info, err)
	}
	if err := c.Identify(timeout(t), proto.Identity{Hostname: "web-2"}); err == nil {
		t.Error("an identity in the middle of a session was accepted")
	}
}
