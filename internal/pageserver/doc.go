//go:build linux

// Package pageserver answers the page faults of the clones of one snapshot. It is
// the inside of the program uffd_handler ([Server]), and what others need to
// start it, to ask it and to hand it a VMM ([Launch], [SendHandshake]).
//
// A [Server] owns a memory file, opened read-only, which it reads and never maps:
// a file that was truncated is then an error, not SIGBUS. For each clone there
// is a session, from the handshake until the VMM has ended:
//
//	handshake.go, peer.go   who connects, and what it hands over
//	session.go              reads events: REMOVE is noted before any fault is answered
//	serve.go                answers faults: where a page fault is answered
//	template.go             fills the template that clones share
//
// With policy share, all clones map the template privately, and a page that one
// of them needed is there for all. With policy copy, every clone gets a page of
// its own.
//
// What goes wrong ends the clone, not the server: a clone whose fault cannot be
// answered is killed, since letting it read anything else would be silent
// corruption, and leaving it would be a hang. Stats keep the reason.
package pageserver
