//go:build linux

package pageserver

import (
	"os"
	"testing"

	"fcvm/internal/pageserver/pstest"
)

// shapes runs a test for each kind of VMM with each policy. A template that is
// only mapped, and stays empty, goes with policy copy.
func shapes(t *testing.T, test func(t *testing.T, f *fixture, held *heldFile, shape pstest.Shape)) {
	for _, shape := range []pstest.Shape{pstest.Anonymous, pstest.Template} {
		for _, p := range []Policy{PolicyCopy, PolicyShare} {
			t.Run(string(shape)+"/"+string(p), func(t *testing.T) {
				c := testConfig(t, p)
				if c.Template == nil {
					c.Template = memfd(t)
					if err := c.Template.Truncate(guestSize); err != nil {
						t.Fatal(err)
					}
				}
				f, held := serveHeld(t, c)
				test(t, f, held, shape)
			})
		}
	}
}

// A VMM that ends while its faults are read for takes nothing with it.
func TestVMMKilledInFault(t *testing.T) {
	shapes(t, func(t *testing.T, f *fixture, held *heldFile, shape pstest.Shape) {
		v, other := f.cloneOf(t, shape), f.cloneOf(t, shape)
		f.sessions(t, 2)
		held.holding.Store(true)
		v.begin(pstest.Op{Kind: pstest.Read, Pages: pstest.Page(200)})
		<-held.reading
		v.Kill()
		held.letGo()
		f.sessions(t, 1)
		if st := f.Stats(); len(st.Failures) != 0 {
			t.Errorf("%+v", st.Failures)
		}
		other.hasSnapshot(t, span(0, testPages)...)
	})
}

// A fault that cannot be served kills the VMM that is the connection's peer.
func TestFailureKillsVMM(t *testing.T) {
	shapes(t, func(t *testing.T, f *fixture, _ *heldFile, shape pstest.Shape) {
		v := f.cloneOf(t, shape)
		if err := os.Truncate(f.config.MemFile, 64*pageSize); err != nil {
			t.Fatal(err)
		}
		if err := <-v.begin(pstest.Op{Kind: pstest.Read, Pages: pstest.Page(200)}); err == nil {
			t.Error("it read what the file does not have")
		}
		v.killed(t)
		if fail := f.failure(t); fail.PID != v.PID() {
			t.Errorf("%+v", fail)
		}
		f.sessions(t, 0)
	})
}
