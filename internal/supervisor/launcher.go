package supervisor

import (
	"context"
	"encoding/json"
	"errors"
)

// launcher is for a build without a page server: clones get their memory from
// the file.
type launcher struct{}

func (launcher) Launch(context.Context, PageServerConfig) (PageServer, error) {
	return nil, errors.ErrUnsupported
}

func (launcher) Adopt(context.Context, json.RawMessage) (PageServer, error) {
	return nil, errors.ErrUnsupported
}
