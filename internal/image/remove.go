package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Removed says what Remove did.
type Removed struct {
	// Untagged are the names that are gone, in short form, sorted.
	Untagged []string
	// Deleted is the ID of the image if its files are gone too, else empty.
	Deleted string
}

// Remove removes a name; with the last name, or by ID, the image itself. The
// error wraps ErrInUse when a lease is held, and then nothing has changed, or
// ErrUnknown.
func (s *Store) Remove(ctx context.Context, refOrID string) (Removed, error) {
	refs, err := s.readRefs()
	if err != nil {
		return Removed{}, err
	}
	id, _, err := s.find(refOrID, refs)
	if err != nil {
		return Removed{}, err
	}
	unlock, err := s.lockDigest(ctx, id, nil)
	if err != nil {
		return Removed{}, err
	}
	defer unlock()

	var done Removed
	var lease *os.File
	defer func() {
		if lease != nil {
			_ = lease.Close()
		}
	}()
	err = s.updateRefs(ctx, func(refs map[string]string) error {
		now, full, err := s.find(refOrID, refs)
		if err != nil {
			return err
		}
		if now != id {
			return fmt.Errorf("remove image %s: its name moved to another image meanwhile; try again", refOrID)
		}
		left := 0
		for name, to := range refs {
			switch {
			case to != id:
			case full == "" || name == full:
				delete(refs, name)
				done.Untagged = append(done.Untagged, shortName(name))
			default:
				left++
			}
		}
		slices.Sort(done.Untagged)
		if left > 0 {
			return nil
		}
		done.Deleted = id
		lease, err = s.claim(id)
		return err
	})
	if err != nil {
		return Removed{}, err
	}
	if done.Deleted == "" {
		return done, nil
	}
	return done, s.delete(ctx, id)
}

// claim takes the lease of an image for good.
func (s *Store) claim(id string) (*os.File, error) {
	f, err := os.Open(s.path(dirName(id), leaseFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // not whole; nobody can hold it
	}
	if err != nil {
		return nil, fmt.Errorf("remove image %s: %w", id, err)
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		_ = f.Close()
		return nil, fmt.Errorf("remove image %s: %w by a VM or a snapshot; see `fcvm ls` and `fcvm snapshot ls`", id, ErrInUse)
	}
	return f, nil
}

// delete moves the image away at once and then removes it at leisure. What a
// crash leaves is swept by the next Open.
func (s *Store) delete(ctx context.Context, id string) error {
	dir, cleanup, err := s.stage(ctx)
	if err != nil {
		return err
	}
	defer cleanup()
	err = os.Rename(s.path(dirName(id)), filepath.Join(dir, "removed"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove image %s: %w", id, err)
	}
	return nil
}

// Lease keeps the image with this ID (in full) from being removed for as long
// as the file, or a copy of it that a child process inherited, is open. The
// error wraps ErrUnknown when there is no such image.
func (s *Store) Lease(id string) (*os.File, error) {
	if !idPattern.MatchString(id) {
		return nil, fmt.Errorf("lease image %q: %w", id, ErrReference)
	}
	path := s.path(dirName(id), leaseFile)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lease image %s: %w", id, ErrUnknown)
	}
	if err != nil {
		return nil, fmt.Errorf("lease image %s: %w", id, err)
	}
	// Only Remove locks it exclusively, and that image is then as good as gone.
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil || !sameFile(f, path) {
		_ = f.Close()
		return nil, fmt.Errorf("lease image %s: %w: it was just removed", id, ErrUnknown)
	}
	return f, nil
}
