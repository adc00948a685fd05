package supervisor

import (
	"errors"
	"testing"

	"fcvm/internal/api"
)

// A VM of huge pages needs an engine that has them, and its clones copy them.
func TestHugePages(t *testing.T) {
	b := newBench(t)
	req := api.RunRequest{
		Name: "golden", Image: "img", ImageID: "img", Engine: "fake", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1, HugePages: true,
	}
	var e *api.Error
	if _, err := b.c.Run(t.Context(), req); !errors.As(err, &e) || e.Code != api.CodeInvalid {
		t.Fatalf("an engine without huge pages: error %v", err)
	}
	b.engine.huge = true
	golden, err := b.c.Run(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if !golden.HugePages || !b.engine.byID(t, golden.ID).machine.HugePages {
		t.Error("the VM's memory is not of huge pages")
	}
	b.snapshot("golden", "snap")
	for name, r := range map[string]api.CloneRequest{
		"share": {Snapshot: "snap", Policy: policyShare},
		"file":  {Snapshot: "snap", MemBackend: "file"},
		"merge": {Snapshot: "snap", Policy: policyCopy, Merge: true},
	} {
		if _, err := b.c.Clone(t.Context(), r, nil); !errors.As(err, &e) || e.Code == api.CodeInternal {
			t.Errorf("%s: error %v", name, err)
		}
	}
	clone := b.clone(api.CloneRequest{Snapshot: "snap"})[0]
	if !clone.HugePages || clone.Policy != policyCopy || !b.engine.byID(t, clone.ID).machine.HugePages {
		t.Errorf("the clone is %+v", clone)
	}
	// And a snapshot of the clone.
	b.snapshot(clone.Name, "again")
	if again := b.clone(api.CloneRequest{Snapshot: "again", Policy: policyCopy})[0]; !again.HugePages {
		t.Errorf("the clone's clone is %+v", again)
	}
}
