package vmm

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Named is an engine under the name that --engine knows.
type Named struct {
	Name   string
	Engine Engine
}

// Choice is the engine that runs a VM where nobody names one.
type Choice struct {
	Named
	Info Info
	// Passed are those that come before it, and why they were not chosen.
	Passed []Passed
}

// Passed is an engine that was not chosen, and why, in words for a person.
type Passed struct{ Name, Reason string }

// errNoNetwork: who names no engine expects that published ports, and the guest's way
// out, work as they do everywhere.
var errNoNetwork = errors.New("its VMs would have no network here: /dev/net/tun cannot be opened")

// Choose returns the first of the engines, the best one first, that can be used on this
// host and whose VMs have a network. The error is that of the last, which should run
// everywhere, and names what the others lack.
func Choose(ctx context.Context, engines []Named) (Choice, error) {
	var c Choice
	var last error
	for _, e := range engines {
		info, err := e.Engine.Info(ctx)
		if err == nil && !info.Network {
			err = errNoNetwork
		}
		if err == nil {
			c.Named, c.Info = e, info
			return c, nil
		}
		if ctx.Err() != nil {
			return Choice{}, context.Cause(ctx)
		}
		last = err
		c.Passed = append(c.Passed, Passed{e.Name, strings.TrimPrefix(err.Error(), ErrUnavailable.Error()+": "+e.Name+": ")})
	}
	if last == nil {
		return c, fmt.Errorf("%w: this fcvm has none", ErrUnavailable)
	}
	for _, p := range c.Passed[:len(c.Passed)-1] {
		last = fmt.Errorf("%w; nor %s: %s", last, p.Name, p.Reason)
	}
	return c, last
}
