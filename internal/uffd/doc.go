//go:build linux

// Package uffd is userfaultfd(2): the only package with its ioctls, and with
// the unsafe that they need.
//
// An [FD] owns a descriptor. Close waits for ioctls that are under way, so that
// none of them can hit a number that the kernel has given to somebody else, and
// every method called after Close returns [ErrClosed].
//
// The memory that the calls work on is that of the process which created the
// descriptor, wherever the descriptor went since: a page server that was handed
// one fills the memory of the VMM, never its own. Only the source of [FD.Copy]
// is the caller's.
package uffd
