package supervisor

import (
	"context"
	"errors"
	"fmt"

	"fcvm/internal/api"
	"fcvm/internal/guest"
	"fcvm/internal/guest/agent"
	"fcvm/internal/image"
	"fcvm/internal/network"
	"fcvm/internal/snapshot"
	"fcvm/internal/uffd"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/firecracker/jail"
)

func invalid(format string, args ...any) *api.Error {
	return &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf(format, args...)}
}

func wrongState(format string, args ...any) *api.Error {
	return &api.Error{Code: api.CodeState, Message: fmt.Sprintf(format, args...)}
}

// classified is a sentinel of a lower layer with what it means to a user.
type classified struct {
	is   error
	code api.Code
	hint string
}

// classes is searched in its order.
func classes() []classified {
	return []classified{
		{guest.ErrNotSetUp, api.CodeUnavailable, "`fcvm setup` gets one"},
		{image.ErrNoCommand, api.CodeInvalid, ""},
		{image.ErrReference, api.CodeInvalid, ""},
		{image.ErrAmbiguous, api.CodeInvalid, ""},
		{image.ErrUnknown, api.CodeNotFound, "`fcvm image pull` gets an image, `fcvm image ls` lists them"},
		{snapshot.ErrNotFound, api.CodeNotFound, "`fcvm snapshot ls` lists them"},
		{snapshot.ErrExists, api.CodeConflict, "choose another name, or remove it with `fcvm snapshot rm`"},
		{snapshot.ErrInUse, api.CodeConflict, ""},
		{snapshot.ErrName, api.CodeInvalid, ""},
		{snapshot.ErrNoSpace, api.CodeUnavailable, ""},
		{snapshot.ErrDamaged, api.CodeDamaged, "remove it with `fcvm snapshot rm`, and make it anew"},
		{network.ErrTaken, api.CodeConflict, "choose another port, or leave the host's part away to get a free one"},
		{uffd.ErrNotPermitted, api.CodeUnavailable, "`fcvm doctor` prints the lines that grant it; --mem-backend file does without"},
		{vmm.ErrNoJail, api.CodeInvalid, ""},
		{vmm.ErrNoHugePages, api.CodeInvalid, ""},
		{jail.ErrUnusable, api.CodeUnavailable, ""},
		{vmm.ErrUnavailable, api.CodeUnavailable, "`fcvm doctor` tells what this host lacks"},
		{vmm.ErrGone, api.CodeState, ""},
		{context.Canceled, api.CodeUnavailable, ""},
	}
}

// explain turns an error into what the API answers. It keeps an *api.Error.
func explain(err error) error {
	if err == nil {
		return nil
	}
	if e := (*api.Error)(nil); errors.As(err, &e) {
		return e
	}
	e := &api.Error{Code: api.CodeInternal, Message: err.Error()}
	for _, c := range classes() {
		if errors.Is(err, c.is) {
			e.Code, e.Hint = c.code, c.hint
			return e
		}
	}
	if g := (*agent.Error)(nil); errors.As(err, &g) {
		e.Code, e.Message = api.CodeInvalid, g.Message
		if g.Code == 126 || g.Code == 127 {
			e.ExitCode = g.Code
		}
	}
	return e
}
