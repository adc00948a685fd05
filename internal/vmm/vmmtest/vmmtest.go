// Package vmmtest is what every engine must pass: one suite, run with real
// guests. An engine's test package calls [Main] from its TestMain and [Run]
// from a test.
//
// The guest is the real one: fcvm-init as its first process, the agent, and a
// small program that holds a known pattern in memory and answers on a port.
package vmmtest

import (
	"context"
	"testing"
	"time"

	"fcvm/internal/vmm"
)

// New makes the engine under test. It is also called in other processes than
// the test's own.
type New func() vmm.Engine

// Option says what an engine cannot do.
type Option func(*lab)

// WithoutNetwork leaves out what needs published ports: the guest's agent is asked
// to ask the probe.
func WithoutNetwork(l *lab) { l.noNetwork = true }

// Called names the suite in reports, where an engine has more than one.
func Called(name string) Option { return func(l *lab) { l.suite += ", " + name } }

// On gives the VMs this network instead of the engine's own choice.
func On(n vmm.Network) Option { return func(l *lab) { l.network = n } }

// Jailed runs the suite with VMs that are locked up. remove removes what is left of one
// that has ended.
func Jailed(remove func(dir string) error) Option {
	return func(l *lab) { l.removeJail = remove }
}

// Dumper has an engine write a snapshot of a paused VM by itself: the device state to the
// file state, and all of its memory to the file mem.
type Dumper func(ctx context.Context, v vmm.VM, state, mem string) error

// Dumps adds the test that the memory of a snapshot is what the engine itself writes.
func Dumps(d Dumper) Option { return func(l *lab) { l.dumper = d } }

// Run runs the suite. It skips, and says why, where the engine or a guest
// kernel is not available.
func Run(t *testing.T, newEngine New, options ...Option) {
	l := newLab(t, newEngine, options...)
	run := func(name string, test func(*testing.T)) {
		before := l.vms.Load()
		t.Run(name, func(t *testing.T) {
			begun := time.Now()
			t.Cleanup(func() { l.report(t, name, int(l.vms.Load()-before), time.Since(begun)) })
			test(t)
		})
	}
	run("Info", l.testInfo)
	run("Golden", func(t *testing.T) {
		l.bootGolden(t)
		t.Run("Regions", l.testRegions)
		t.Run("PauseResume", l.testPauseResume)
		t.Run("SaveState", l.testSaveState)
		t.Run("Published", l.testPublished)
		l.takeSnapshot(t)
		if l.dumper != nil {
			t.Run("SameMemory", func(t *testing.T) { l.sameMemory(t, l.golden, l.snapshot.mem, "") })
		}
	})
	if l.snapshot == nil {
		t.Fatal("no snapshot to go on with; a -run that selects tests must select Golden too")
	}
	for _, b := range backends {
		run("Restore/"+b.name, func(t *testing.T) { l.testRestore(t, b) })
		run("SnapshotOfClone/"+b.name, func(t *testing.T) { l.testSnapshotOfClone(t, b) })
		if l.dumper != nil {
			run("SameMemory/"+b.name, func(t *testing.T) { l.testSameMemory(t, b) })
		}
		run("Ahead/"+b.name, func(t *testing.T) { l.testAhead(t, b) })
		run("Balloon/"+b.name, func(t *testing.T) { l.testBalloon(t, b) })
		run("Cancel/"+b.name, func(t *testing.T) { l.testCancelRestore(t, b) })
	}
	run("Large", l.testLarge)
	run("HugePages", l.testHugePages)
	run("ManyAtOnce", l.testManyAtOnce)
	run("AdoptFromAnotherProcess", l.testAdopt)
	run("AdoptAgain", l.testAdoptAgain)
	run("Inherit", l.testInherit)
	run("Kill", l.testKill)
	run("Dead", l.testDead)
	run("Hung", l.testHung)
	run("PortTaken", l.testPortTaken)
	run("Publish", l.testPublish)
	run("BadBoot", l.testBadBoot)
	run("BadRestore", l.testBadRestore)
	run("CancelBoot", l.testCancelBoot)
	run("NeverBoots", l.testNeverBoots)
}
