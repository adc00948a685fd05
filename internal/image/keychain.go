package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// podmanKeychain reads the files in which podman keeps credentials
// (containers-auth.json(5)). authn.DefaultKeychain does so only where there is
// no configuration of docker at all.
type podmanKeychain struct{}

// Resolve returns the credentials for a repository, or authn.Anonymous.
func (podmanKeychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	for _, path := range podmanFiles() {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read credentials: %w", err)
		}
		cf, err := config.LoadFromReader(f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("read credentials in %s: %w", path, err)
		}
		registry := r.RegistryStr()
		keys := []string{r.String(), registry}
		if registry == name.DefaultRegistry {
			keys = append(keys, authn.DefaultAuthKey, "docker.io")
		}
		for _, k := range keys {
			c, err := cf.GetAuthConfig(k)
			if err != nil {
				return nil, fmt.Errorf("read credentials in %s: %w", path, err)
			}
			c.ServerAddress = ""
			if c != (types.AuthConfig{}) {
				return authn.FromConfig(authn.AuthConfig{
					Username: c.Username, Password: c.Password, Auth: c.Auth,
					IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
				}), nil
			}
		}
	}
	return authn.Anonymous, nil
}

// podmanFiles lists where credentials may be, the most specific first.
func podmanFiles() []string {
	if f := os.Getenv("REGISTRY_AUTH_FILE"); f != "" {
		return []string{f}
	}
	var files []string
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		files = append(files, filepath.Join(d, "containers", "auth.json"))
	} else {
		files = append(files, fmt.Sprintf("/run/containers/%d/auth.json", os.Getuid()))
	}
	if d, err := os.UserConfigDir(); err == nil {
		files = append(files, filepath.Join(d, "containers", "auth.json"))
	}
	return files
}
