package vmm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
)

// stub is an engine that is only asked what it is.
type stub struct {
	Engine
	info Info
	err  error
}

func (s stub) Info(context.Context) (Info, error) { return s.info, s.err }

func TestChoose(t *testing.T) {
	missing := fmt.Errorf("%w: fc: there is none", ErrUnavailable)
	fc := Named{"fc", stub{info: Info{Name: "fc", Network: true}}}
	noNetwork := Named{"fc", stub{info: Info{Name: "fc"}}}
	noFC := Named{"fc", stub{err: missing}}
	qemu := Named{"qemu", stub{info: Info{Name: "qemu", Network: true}}}
	noQEMU := Named{"qemu", stub{err: fmt.Errorf("%w: qemu: install it", ErrUnavailable)}}
	for name, c := range map[string]struct {
		engines []Named
		want    string
		passed  []Passed
		err     string
	}{
		"both":       {engines: []Named{fc, qemu}, want: "fc"},
		"no network": {[]Named{noNetwork, qemu}, "qemu", []Passed{{"fc", "its VMs would have no network here: /dev/net/tun cannot be opened"}}, ""},
		"not there":  {[]Named{noFC, qemu}, "qemu", []Passed{{"fc", "there is none"}}, ""},
		"no qemu":    {engines: []Named{fc, noQEMU}, want: "fc"},
		"neither": {[]Named{noNetwork, noQEMU}, "", []Passed{{"fc", "its VMs would have no network here: /dev/net/tun cannot be opened"}, {"qemu", "install it"}},
			"engine not available: qemu: install it; nor fc: its VMs would have no network here: /dev/net/tun cannot be opened"},
		"none": {err: "engine not available: this fcvm has none"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Choose(t.Context(), c.engines)
			if got.Name != c.want || got.Info.Name != c.want || !slices.Equal(got.Passed, c.passed) {
				t.Errorf("got %+v", got)
			}
			if (err == nil) != (c.err == "") || err != nil && (err.Error() != c.err || !errors.Is(err, ErrUnavailable)) {
				t.Errorf("got the error %v, want %q", err, c.err)
			}
		})
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	cancel(stop)
	if _, err := Choose(ctx, []Named{noFC, qemu}); !errors.Is(err, stop) {
		t.Errorf("called off: %v", err)
	}
}
