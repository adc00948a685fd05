package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"fcvm/internal/flock"
)

// index is refs.json.
type index struct {
	Version int `json:"version"`
	// Refs leads from full names to IDs.
	Refs map[string]string `json:"refs"`
}

// readRefs returns the names in the store. Writers replace the file at once, so
// no lock is needed.
func (s *Store) readRefs() (map[string]string, error) {
	b, err := os.ReadFile(s.path(refsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]string{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read names of images: %w", err)
	}
	return parseRefs(b, s.path(refsFile))
}

func parseRefs(b []byte, path string) (map[string]string, error) {
	var x index
	if err := json.Unmarshal(b, &x); err != nil {
		return nil, fmt.Errorf("read names of images: %w: %w; remove %s (the images stay, without names)", ErrCorrupt, err, path)
	}
	if x.Version != schemaVersion {
		return nil, fmt.Errorf("read names of images: %s is of version %d, this fcvm knows %d", path, x.Version, schemaVersion)
	}
	for name, id := range x.Refs {
		if !idPattern.MatchString(id) {
			return nil, fmt.Errorf("read names of images: %w: %s leads to %q; remove %s (the images stay, without names)", ErrCorrupt, name, id, path)
		}
	}
	if x.Refs == nil {
		x.Refs = map[string]string{}
	}
	return x.Refs, nil
}

// updateRefs changes the names under a lock. Nothing is written when change
// returns an error.
func (s *Store) updateRefs(ctx context.Context, change func(refs map[string]string) error) error {
	lock, err := flock.Open(ctx, s.path(refsLock), unix.LOCK_EX, nil)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	refs, err := s.readRefs()
	if err != nil {
		return err
	}
	if err := change(refs); err != nil {
		return err
	}
	b, err := json.MarshalIndent(index{schemaVersion, refs}, "", "  ")
	if err != nil {
		return fmt.Errorf("write names of images: %w", err)
	}
	return writeFile(s.path(refsFile), append(b, '\n'))
}

// tag lets names lead to an image, which must be there and its digest locked.
func (s *Store) tag(ctx context.Context, id string, names []string) error {
	refs, err := s.readRefs()
	if err != nil {
		return err
	}
	same := true
	for _, n := range names {
		same = same && refs[n] == id
	}
	if same {
		return nil // the common case of a run writes nothing
	}
	return s.updateRefs(ctx, func(refs map[string]string) error {
		for _, n := range names {
			refs[n] = id
		}
		return nil
	})
}
