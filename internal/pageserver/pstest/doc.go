//go:build linux

// Package pstest tests page servers, ours and other people's: programs that are
// handed the userfaultfd of a VMM in Firecracker's handshake, and answer the page
// faults of its guest memory from then on.
//
// A [VMM] is a process of its own, with memory that is mapped as a VMM maps it and
// a real userfaultfd on it. It needs no KVM: instead of a guest, threads carry out
// a [Script] of accesses, and tell what they saw and how long it took.
//
// A VMM is this program again: [Main] must be called at the start of main, or of
// TestMain. The package knows nothing of the page server's own package, so that
// the tests of that one may use it.
package pstest
