// Package testreport collects which tests ran on which engine, of which version, by
// which accelerator: what a test log else tells only to who reads all of it. Tests append
// to one file, from several processes and machines; command test/engines prints it.
package testreport

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// EnvFile names the file that tests append to; without it they report nothing.
const EnvFile = "FCVM_TEST_REPORT"

// EnvAccel names the accelerator that tests must find, "kvm" or "tcg": a lab that
// gives them another must not pass.
const EnvAccel = "FCVM_TEST_ACCEL"

// envLab is set in the KVM lab (test/kvmlab).
const envLab = "KVMLAB"

// Outcome of a test.
type Outcome string

// The outcomes.
const (
	Passed  Outcome = "passed"
	Skipped Outcome = "skipped"
	Failed  Outcome = "failed"
)

// Entry is one test on one engine, or a note.
type Entry struct {
	// Suite and Test name it. Tests of one suite are counted together.
	Suite string `json:"suite,omitempty"`
	Test  string `json:"test,omitempty"`
	// Engine, Version and Accel are as in [fcvm/internal/vmm.Info].
	Engine  string  `json:"engine,omitempty"`
	Version string  `json:"version,omitempty"`
	Accel   string  `json:"accel,omitempty"`
	Lab     bool    `json:"lab,omitempty"`
	Outcome Outcome `json:"outcome,omitempty"`
	// VMs is how many were started.
	VMs int `json:"vms,omitempty"`
	// Seconds that the test took.
	Seconds float64 `json:"seconds,omitempty"`
	// Note is said instead of all that: why something did not run.
	Note string `json:"note,omitempty"`
}

// Result is what testing.T tells of itself when a test ends.
type Result interface {
	Failed() bool
	Skipped() bool
}

// Of tells the outcome of a test that ends.
func Of(t Result) Outcome {
	switch {
	case t.Failed():
		return Failed
	case t.Skipped():
		return Skipped
	default:
		return Passed
	}
}

// Append adds e to the file that [EnvFile] names. It may be called by many processes.
func Append(e Entry) (err error) {
	path := os.Getenv(EnvFile)
	if path == "" {
		return nil
	}
	e.Lab = os.Getenv(envLab) != ""
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("report test: %w", err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("report test: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// One write, so that lines of others are not in it.
	if _, err := f.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("report test: %w", err)
	}
	return nil
}

// Read reads what was appended.
func Read(r io.Reader) ([]Entry, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read report: %w", err)
	}
	var all []Entry
	for line := range bytes.Lines(b) {
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("read report: %w: %q", err, line)
		}
		all = append(all, e)
	}
	return all, nil
}
