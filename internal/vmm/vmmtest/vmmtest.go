// Package vmmtest is what every engine must pass: one suite, run with real
// guests. An engine's test package calls [Main] from its TestMain and [Run]
// from a test.
//
// The guest is the real one: fcvm-init as its first process, the agent, and a
// small program that holds a known pattern in memory and answers on a port.
package vmmtest

import (
	"testing"

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

// UpTo3GiB leaves out guests with a hole in their memory.
func UpTo3GiB(l *lab) { l.noLarge = true }

// Run runs the suite. It skips, and says why, where the engine or a guest
// kernel is not available.
func Run(t *testing.T, newEngine New, options ...Option) {
	l := newLab(t, newEngine, options...)
	t.Run("Info", l.testInfo)
	t.Run("Golden", func(t *testing.T) {
		l.bootGolden(t)
		t.Run("Regions", l.testRegions)
		t.Run("PauseResume", l.testPauseResume)
		t.Run("SaveState", l.testSaveState)
		t.Run("Published", l.testPublished)
		l.takeSnapshot(t)
	})
	if l.snapshot == nil {
		t.Fatal("no snapshot to go on with; a -run that selects tests must select Golden too")
	}
	for _, b := range backends {
		t.Run("Restore/"+b.name, func(t *testing.T) { l.testRestore(t, b) })
		t.Run("SnapshotOfClone/"+b.name, func(t *testing.T) { l.testSnapshotOfClone(t, b) })
		t.Run("Ahead/"+b.name, func(t *testing.T) { l.testAhead(t, b) })
		t.Run("Balloon/"+b.name, func(t *testing.T) { l.testBalloon(t, b) })
		t.Run("Cancel/"+b.name, func(t *testing.T) { l.testCancelRestore(t, b) })
	}
	t.Run("Large", l.testLarge)
	t.Run("ManyAtOnce", l.testManyAtOnce)
	t.Run("AdoptFromAnotherProcess", l.testAdopt)
	t.Run("AdoptAgain", l.testAdoptAgain)
	t.Run("Inherit", l.testInherit)
	t.Run("Kill", l.testKill)
	t.Run("Dead", l.testDead)
	t.Run("Hung", l.testHung)
	t.Run("PortTaken", l.testPortTaken)
	t.Run("Publish", l.testPublish)
	t.Run("BadBoot", l.testBadBoot)
	t.Run("BadRestore", l.testBadRestore)
	t.Run("CancelBoot", l.testCancelBoot)
	t.Run("NeverBoots", l.testNeverBoots)
}
