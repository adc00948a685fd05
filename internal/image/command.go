package image

import (
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// ResolveCommand returns the arguments of the container's process as docker
// combines them: a given entrypoint replaces the image's and drops the image's
// command; a given command replaces the image's. With clear (--entrypoint "")
// the image's entrypoint and command are both dropped. The error wraps
// ErrNoCommand when nothing is left.
func ResolveCommand(cfg *v1.ConfigFile, entrypoint []string, clear bool, cmd []string) ([]string, error) {
	var args []string
	switch {
	case len(entrypoint) > 0:
		args = append(args, entrypoint...)
	case clear:
	default:
		args = append(args, cfg.Config.Entrypoint...)
		if len(cmd) == 0 {
			cmd = cfg.Config.Cmd
		}
	}
	args = append(args, cmd...)
	if len(args) == 0 || args[0] == "" {
		return nil, fmt.Errorf("%w: name one after the image, as in `fcvm run IMAGE COMMAND`", ErrNoCommand)
	}
	return args, nil
}
