//go:build linux

// Package pageserver answers the page faults of the clones of one snapshot. It is
// the inside of the program uffd_handler ([Server]), and what others need to ask it
// and to hand it the memory of a VMM ([Client], [Guest], [SendHandshake]). Package
// keeper, below this one, starts it, and replaces it when it dies.
//
// A [Server] owns a memory file, opened read-only, which it reads and never maps:
// a file that was truncated is then an error, not SIGBUS. For each clone there
// is a session, until the VMM has ended:
//
//	handshake.go, peer.go   who connects, and what it hands over
//	reception.go            how many may be at it, and for how long
//	admit.go                a guest becomes a session
//	attend.go               a session's thread: waits for events, and has faults answered
//	session.go              reads events: REMOVE is noted before any fault is answered
//	serve.go                answers faults: where a page fault is answered
//	slow.go                 answers those that wait for the disk
//	template.go             fills the template that clones share
//	ahead.go, record.go     what is done before anybody asks: working set, background fill
//	source.go               reads the memory file, and checks what it read
//	ledger.go               what outlives this process
//
// With policy share, all clones map the template privately, and a page that one
// of them needed is there for all. With policy copy, every clone gets a page of
// its own.
//
// What goes wrong ends the clone, not the server: a clone whose fault cannot be
// answered is killed, since letting it read anything else would be silent
// corruption, and leaving it would be a hang. Stats keep the reason. And what ends
// the server does not end the clones: all that a successor needs is in the ledgers
// and in the descriptors that the keeper holds.
package pageserver
