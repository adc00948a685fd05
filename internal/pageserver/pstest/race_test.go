//go:build linux && race

package pstest

const raceEnabled = true
