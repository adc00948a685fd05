//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"fcvm/internal/api"
	"fcvm/internal/guest"
	"fcvm/internal/guest/proto"
	"fcvm/internal/image"
	"fcvm/internal/snapshot"
	"fcvm/internal/vmm"
)

// Exit codes, as exitCodesLong documents them.
const (
	exitError       = 1
	exitInvalid     = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnavailable = 5
	exitState       = 6
	exitDamaged     = 7
	exitOwn         = 125
)

// codeInterrupted goes beyond what the supervisor answers.
const codeInterrupted api.Code = "interrupted"

// codes is the table of error codes and their exit codes.
func codes() map[api.Code]int {
	return map[api.Code]int{
		api.CodeInternal:    exitError,
		api.CodeInvalid:     exitInvalid,
		api.CodeNotFound:    exitNotFound,
		api.CodeConflict:    exitConflict,
		api.CodeUnavailable: exitUnavailable,
		api.CodeState:       exitState,
		api.CodeDamaged:     exitDamaged,
	}
}

// sentinel says what an error of another package means here.
type sentinel struct {
	err  error
	code api.Code
	hint string
}

func sentinels() []sentinel {
	return []sentinel{
		{guest.ErrNotSetUp, api.CodeUnavailable, "run `fcvm setup`"},
		{vmm.ErrUnavailable, api.CodeUnavailable, "`fcvm doctor` tells what this machine lacks"},
		{image.ErrReference, api.CodeInvalid, ""},
		{image.ErrAmbiguous, api.CodeInvalid, "`fcvm image ls` shows the images"},
		{image.ErrNoCommand, api.CodeInvalid, ""},
		{image.ErrInUse, api.CodeConflict, "`fcvm ls -a` and `fcvm snapshot ls` show what uses it"},
		{image.ErrNoPlatform, api.CodeNotFound, ""},
		{image.ErrUnknown, api.CodeNotFound, ""},
		{image.ErrUnauthorized, api.CodeUnavailable, "log in with `docker login` or `podman login`, whose credentials fcvm reads; or check the name"},
		{image.ErrRegistry, api.CodeUnavailable, ""},
		{image.ErrNoSpace, api.CodeUnavailable, ""},
		{image.ErrCorrupt, api.CodeDamaged, ""},
		{snapshot.ErrNotFound, api.CodeNotFound, "`fcvm snapshot ls` shows the snapshots"},
		{snapshot.ErrExists, api.CodeConflict, ""},
		{snapshot.ErrInUse, api.CodeConflict, "`fcvm ls -a` shows its clones"},
		{snapshot.ErrName, api.CodeInvalid, ""},
		{snapshot.ErrNoSpace, api.CodeUnavailable, ""},
		{snapshot.ErrDamaged, api.CodeDamaged, ""},
		{api.ErrNoSupervisor, api.CodeUnavailable, ""},
		{syscall.ENOSPC, api.CodeUnavailable, ""},
		{os.ErrPermission, api.CodeUnavailable, ""},
	}
}

// usageError is an error in the command line.
type usageError struct {
	message, hint string
	// command whose --help helps, such as "fcvm run".
	command string
}

func (e *usageError) Error() string { return e.message }

// invalid returns an error about the value of an argument.
func invalid(format string, args ...any) error {
	return &usageError{message: fmt.Sprintf(format, args...)}
}

// exitStatus ends the program with the code of a process in a VM, silently.
type exitStatus int

func (e exitStatus) Error() string { return "exit status " + strconv.Itoa(int(e)) }

// ownError is an error of run and exec that is not the process's.
type ownError struct{ err error }

func (e *ownError) Error() string { return e.err.Error() }
func (e *ownError) Unwrap() error { return e.err }

// failures are errors of several arguments of one command, in their order.
type failures []error

func (f failures) Error() string { return errors.Join(f...).Error() }

// failure is an error as it is printed.
type failure struct {
	Version  int      `json:"version"`
	Code     api.Code `json:"code"`
	Message  string   `json:"message"`
	Hint     string   `json:"hint,omitempty"`
	ExitCode int      `json:"exit_code"`
}

// describe turns an error into what is printed. sig is the signal that the
// program got, or nil.
func describe(err error, sig os.Signal) failure {
	f := classify(err)
	f.Version = api.SchemaVersion
	if f.ExitCode == 0 {
		f.ExitCode = codes()[f.Code]
	}
	var own *ownError
	if errors.As(err, &own) && f.ExitCode < exitOwn {
		f.ExitCode = exitOwn
	}
	if s, ok := sig.(syscall.Signal); ok && errors.Is(err, context.Canceled) {
		f.Code, f.Message, f.Hint, f.ExitCode = codeInterrupted, "interrupted", "", 128+int(s)
	}
	return f
}

func classify(err error) failure {
	f := failure{Code: api.CodeInternal, Message: err.Error()}
	var (
		usage *usageError
		srv   *api.Error
		proc  *proto.Error
	)
	switch {
	case errors.As(err, &usage):
		f.Code, f.Hint = api.CodeInvalid, usage.hint
		if f.Hint == "" && usage.command != "" {
			f.Hint = "see `" + usage.command + " --help`"
		}
	case errors.As(err, &srv):
		f.Code, f.Hint, f.ExitCode = srv.Code, srv.Hint, srv.ExitCode
	case errors.As(err, &proc):
		f.Code, f.ExitCode = api.CodeInvalid, proc.Code
	default:
		for _, s := range sentinels() {
			if errors.Is(err, s.err) {
				f.Code, f.Hint = s.code, s.hint
				// Some packages put it into the message; once is enough.
				f.Message = strings.TrimSuffix(f.Message, "; "+s.hint)
				break
			}
		}
	}
	return f
}

// report prints an error and returns the exit code of the program.
func (a *app) report(err error, sig os.Signal, asJSON bool) int {
	var status exitStatus
	var several failures
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &several):
		code := 0
		for _, e := range several {
			if c := a.report(e, sig, asJSON); code == 0 {
				code = c
			}
		}
		return code
	}
	f := describe(err, sig)
	if asJSON {
		a.ui.ErrorJSON(f)
	} else {
		a.ui.Error(f.Message, f.Hint)
	}
	return f.ExitCode
}

// each calls f for each name, whatever happened to those before.
func each(names []string, f func(name string) error) error {
	var failed failures
	for _, name := range names {
		if err := f(name); err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return failed
}

func quote(s string) string { return strconv.Quote(s) }
