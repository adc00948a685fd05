//go:build linux

package pageserver

import (
	"testing"

	"fcvm/internal/pageserver/pstest"
)

// session waits for the one that there is.
func (f *fixture) session(t testing.TB) *session {
	t.Helper()
	f.sessions(t, 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.Server.sessions {
		return s
	}
	t.Fatal("the session is over")
	return nil
}

// A session ends with its VMM wherever its thread waits: in read(2), or in poll(2)
// because others place pages, too.
func TestThreadEndsWhereverItWaits(t *testing.T) {
	for _, others := range []int32{0, 1} {
		f := serve(t, testConfig(t, PolicyCopy))
		v := f.clone(t)
		s := f.session(t)
		s.attendant.others.Store(others)
		// From the next event on it waits in the other way.
		for p := range 3 {
			v.do(t, pstest.Op{Kind: pstest.Read, Pages: pstest.Page(p)})
		}
		v.Kill()
		f.sessions(t, 0)
		if blocking := s.attendant.blocking; blocking != (others == 0) {
			t.Errorf("with %d others, it waited in read(2): %v", others, blocking)
		}
	}
}

// More faults at once than are read at once are all answered, and so are those after
// them.
func TestMoreFaultsThanABufferHolds(t *testing.T) {
	const threads = 130
	for _, policy := range []Policy{PolicyCopy, PolicyShare} {
		f := serve(t, testConfig(t, policy))
		shape := pstest.Anonymous
		if policy == PolicyShare {
			shape = pstest.Template
		}
		v := f.vmm(t, pstest.Config{Shape: shape, Threads: threads + 1, Regions: halves(guestSize)})
		script := pstest.Script{Threads: make([][]pstest.Op, threads+1)}
		asleep := pstest.Op{Kind: pstest.AwaitAsleep}
		for i := range threads {
			script.Threads[i] = []pstest.Op{
				{Kind: pstest.Check, Pages: pstest.Page(i), Expect: pstest.Expect{Snapshot: true}},
				{Kind: pstest.Check, Pages: pstest.Page(threads + i%(testPages-threads)), Expect: pstest.Expect{Snapshot: true}},
			}
			asleep.Others, asleep.Steps = append(asleep.Others, i), append(asleep.Steps, 0)
		}
		script.Threads[threads] = []pstest.Op{asleep, {Kind: pstest.Connect, Handshake: &pstest.Handshake{Socket: f.socket}}}
		r, err := v.Run(script)
		if err != nil {
			t.Fatal(err)
		}
		if wrong := r.Wrong(); len(wrong) > 0 {
			t.Error(wrong)
		}
		// Who fills the template for one answers its neighbours, too.
		if st := f.sessions(t, 1)[0]; policy == PolicyCopy && st.Faults < threads {
			t.Errorf("%d faults", st.Faults)
		}
	}
}
