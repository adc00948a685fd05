package image

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// Prefixes of images on the local disk.
const (
	layoutPrefix  = "oci:"
	ociArchive    = "oci-archive:"
	dockerArchive = "docker-archive:"
)

// reference is a parsed name.
type reference struct {
	// prefix is empty for an image in a registry.
	prefix string
	// path of a local image, absolute, and the tag in it or "".
	path, tag string
	// remote is the name in a registry.
	remote name.Reference
}

// parseReference understands what docker does ("nginx", "nginx:1.22",
// "host:5000/a/b@sha256:…"), and local images: oci:DIR[:TAG],
// oci-archive:FILE[:TAG], docker-archive:FILE[:NAME].
func parseReference(s string) (reference, error) {
	for _, p := range []string{layoutPrefix, ociArchive, dockerArchive} {
		if rest, ok := strings.CutPrefix(s, p); ok {
			return parseLocal(p, rest)
		}
	}
	s = strings.TrimPrefix(s, "docker://")
	r, err := name.ParseReference(s)
	if err == nil && !wellFormed(r.Context()) {
		err = ErrReference
	}
	if err != nil {
		return reference{}, fmt.Errorf("parse image name %q: %w; write it like nginx, nginx:1.27 or registry.example/team/app@sha256:…", s, ErrReference)
	}
	return reference{remote: r}, nil
}

// component is a part of a repository's name; the library takes more.
var component = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)

func wellFormed(r name.Repository) bool {
	for c := range strings.SplitSeq(r.RepositoryStr(), "/") {
		if !component.MatchString(c) {
			return false
		}
	}
	return !strings.HasPrefix(r.RegistryStr(), ".") && !strings.HasPrefix(r.RegistryStr(), "-")
}

// parseLocal splits PATH[:TAG]. A path that exists as it is has no tag.
func parseLocal(prefix, s string) (reference, error) {
	path, tag := s, ""
	if _, err := os.Stat(s); err != nil {
		if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, '/') {
			path, tag = s[:i], s[i+1:]
			// The name in a docker archive has a tag of its own: FILE:NAME:TAG.
			if j := strings.IndexByte(s, ':'); prefix == dockerArchive && j < i {
				path, tag = s[:j], s[j+1:]
			}
		}
	}
	if path == "" {
		return reference{}, fmt.Errorf("parse image name %q: %w; no path given", prefix+s, ErrReference)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return reference{}, fmt.Errorf("parse image name %q: %w", prefix+s, err)
	}
	return reference{prefix: prefix, path: abs, tag: tag}, nil
}

// String is the full name under which the store keeps the image:
// "docker.io/library/nginx:latest".
func (r reference) String() string {
	if r.prefix != "" {
		if r.tag == "" {
			return r.prefix + r.path
		}
		return r.prefix + r.path + ":" + r.tag
	}
	sep := ":"
	if _, ok := r.remote.(name.Digest); ok {
		sep = "@"
	}
	registry := r.remote.Context().RegistryStr()
	if registry == name.DefaultRegistry {
		registry = "docker.io"
	}
	return registry + "/" + r.remote.Context().RepositoryStr() + sep + r.remote.Identifier()
}

// shortName is the form in which people write a full name.
func shortName(full string) string {
	s, ok := strings.CutPrefix(full, "docker.io/")
	if !ok {
		return full
	}
	return strings.TrimPrefix(s, "library/")
}
