// Command fcvm runs OCI images in microVMs, snapshots them, and starts clones
// that share memory.
//
// A file here is a command: it parses arguments and prints results. What happens
// is done by the packages below internal: images, snapshots, setup and doctor
// directly on the data directory, everything about VMs by the supervisor, over
// internal/api.
package main

//go:generate go test -run Docs$ -update .
