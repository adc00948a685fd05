package snapshot

import (
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"fcvm/internal/workingset"
)

// WorkingSet is the path of the working set. The file is not there before a
// clone was recorded.
func (s *Snapshot) WorkingSet() string { return filepath.Join(s.Dir, workingSetFile) }

// WorkingSetID is what a working set of this snapshot carries, and none of
// another that once had its name does.
func (s *Snapshot) WorkingSetID() (workingset.ID, error) {
	var id workingset.ID
	b, err := hex.DecodeString(s.Sum)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%w: the manifest's sum is %q", ErrDamaged, s.Sum)
	}
	copy(id[:], b)
	return id, nil
}

// workingSetTries bounds how often a working set is read: the page server writes
// it in place, and who reads in that moment sees half of it. The next read does
// not.
const workingSetTries = 3

// ReadWorkingSet reads the working set. The error wraps fs.ErrNotExist when
// nothing was recorded yet, and [workingset.ErrUnusable] when the file is stale,
// torn or corrupt: without it clones are slower, and nothing else.
func (s *Snapshot) ReadWorkingSet() (*workingset.Set, error) {
	id, err := s.WorkingSetID()
	if err != nil {
		return nil, err
	}
	// Opening a pipe would wait for a writer.
	if fi, err := os.Lstat(s.WorkingSet()); err != nil {
		return nil, fmt.Errorf("read working set: %w", err)
	} else if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: it is not a file", workingset.ErrUnusable)
	}
	var set *workingset.Set
	for range workingSetTries {
		var b []byte
		if b, err = s.workingSetBytes(); err != nil {
			return nil, fmt.Errorf("read working set: %w", err)
		}
		if set, err = workingset.Parse(b, id, s.pages()); err == nil {
			return set, nil
		}
	}
	return nil, err
}

// workingSetBytes returns the file, or as much of it as shows that it is too long.
func (s *Snapshot) workingSetBytes() ([]byte, error) {
	f, err := os.Open(s.WorkingSet())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, int64(workingset.FileSize(s.pages()))+1))
}
