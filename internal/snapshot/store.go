// Package snapshot keeps snapshots: the memory and device state of a VM, and a
// manifest that says what they are.
//
// Each is a directory below the store's, named after the snapshot:
//
//	NAME/manifest.json  what it is, with sizes and checksums
//	NAME/mem.img        guest memory, sparse: zero pages are holes
//	NAME/mem.sums       a checksum of each page of mem.img, see internal/pagesum
//	NAME/state.bin      device state, the engine's own format
//	NAME/lease          locked (flock) by every VM that maps mem.img
//	NAME/verified       the files' inodes and times when their sums last matched
//	NAME/workingset     the pages that clones need first, see internal/workingset
//
// A snapshot never changes, but for its working set: the page server writes that
// in place as clones come, and it belongs to no checksum of the snapshot, since
// losing it costs speed only. A snapshot is written in .NAME.new, synced and then
// renamed, so it is there whole or not at all. Several processes may use one
// store at the same time: a lock on .NAME.new tells a creation that runs from
// one that was killed, and the next Open removes what the latter left.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Sentinels on which callers decide.
var (
	// ErrNotFound means that there is no snapshot of that name.
	ErrNotFound = errors.New("no such snapshot")
	// ErrExists means that the name is taken, or is being taken.
	ErrExists = errors.New("snapshot exists")
	// ErrInUse means that VMs still map the snapshot's memory.
	ErrInUse = errors.New("snapshot is in use")
	// ErrName means that the name cannot name a snapshot.
	ErrName = errors.New("malformed snapshot name")
	// ErrNoSpace means that the disk is too full for the snapshot.
	ErrNoSpace = errors.New("not enough disk space")
)

const (
	newSuffix = ".new"
	delSuffix = ".del"
)

// Store is a directory of snapshots. Its methods may be called concurrently,
// also by several processes.
type Store struct {
	dir string
}

// Open opens the store in dir, which is made where it is missing. What killed
// processes left half made is removed.
func Open(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	s := &Store{dir: abs}
	if err := s.sweep(); err != nil {
		return nil, err
	}
	return s, nil
}

// Snapshot is a snapshot that is there.
type Snapshot struct {
	Manifest
	// Dir holds the snapshot's files, an absolute path.
	Dir string
}

// Memory is the path of the memory file.
func (s *Snapshot) Memory() string { return filepath.Join(s.Dir, memoryFile) }

// PageSums is the path of the checksums of the memory file's pages.
func (s *Snapshot) PageSums() string { return filepath.Join(s.Dir, sumsFile) }

// State is the path of the device state.
func (s *Snapshot) State() string { return filepath.Join(s.Dir, stateFile) }

// DiskBytes is what the snapshot's files occupy, its working set among them, and
// holes not counted. Blocks that a file system shares between files (reflinks)
// count in each.
func (s *Snapshot) DiskBytes() int64 {
	n := occupied(s.WorkingSet())
	for _, f := range s.Files {
		n += occupied(filepath.Join(s.Dir, f.Name))
	}
	return n
}

// occupied is 0 for a file that is not there.
func occupied(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512 // stat(2): units of 512 bytes
}

// Get returns the snapshot of this name after a cheap look: the manifest is
// whole, and the files are there with the right sizes. The error wraps ErrName,
// ErrNotFound (with a similar name, where there is one) or ErrDamaged.
func (s *Store) Get(name string) (*Snapshot, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	snap, err := s.load(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, s.notFound(name)
	}
	if err != nil {
		return nil, fmt.Errorf("open snapshot %s: %w", name, err)
	}
	return snap, nil
}

func (s *Store) load(name string) (*Snapshot, error) {
	dir := filepath.Join(s.dir, name)
	if fi, err := os.Lstat(dir); err != nil {
		return nil, err
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%w: %s is not a directory", ErrDamaged, dir)
	}
	f, err := os.Open(filepath.Join(dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		// Between the two looks it may have been removed, which is no damage.
		if _, err := os.Lstat(dir); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %s is missing", ErrDamaged, manifestFile)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := ParseManifest(f)
	if err != nil {
		return nil, err
	}
	if m.Name != name {
		return nil, fmt.Errorf("%w: its manifest is that of %s", ErrDamaged, m.Name)
	}
	snap := &Snapshot{Manifest: *m, Dir: dir}
	return snap, snap.checkSizes()
}

// checkSizes tells a missing or truncated file from the sizes alone.
func (s *Snapshot) checkSizes() error {
	for _, f := range s.Files {
		fi, err := os.Lstat(filepath.Join(s.Dir, f.Name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if _, err := os.Lstat(s.Dir); err != nil {
				return err
			}
			return fmt.Errorf("%w: %s is missing", ErrDamaged, f.Name)
		case err != nil:
			return err
		case !fi.Mode().IsRegular():
			return fmt.Errorf("%w: %s is not a file", ErrDamaged, f.Name)
		case fi.Size() < f.Size:
			return fmt.Errorf("%w: %s is truncated: it has %d of %d bytes", ErrDamaged, f.Name, fi.Size(), f.Size)
		case fi.Size() > f.Size:
			return fmt.Errorf("%w: %s was edited: it has %d bytes instead of %d", ErrDamaged, f.Name, fi.Size(), f.Size)
		}
	}
	return nil
}

// Names returns the names of all snapshots, damaged ones included, in
// alphabetical order.
func (s *Store) Names() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && isName(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Listed is an entry of List.
type Listed struct {
	Name string
	// Snapshot is nil when Err is not.
	Snapshot *Snapshot
	// Err says why a snapshot cannot be used.
	Err error
}

// List returns all snapshots, the oldest first and damaged ones last.
func (s *Store) List() ([]Listed, error) {
	names, err := s.Names()
	if err != nil {
		return nil, err
	}
	var list []Listed
	for _, n := range names {
		snap, err := s.Get(n)
		if errors.Is(err, ErrNotFound) {
			continue // removed while we looked
		}
		list = append(list, Listed{Name: n, Snapshot: snap, Err: err})
	}
	slices.SortStableFunc(list, func(a, b Listed) int {
		switch {
		case a.Snapshot == nil && b.Snapshot == nil:
			return 0
		case a.Snapshot == nil:
			return 1
		case b.Snapshot == nil:
			return -1
		}
		return a.Snapshot.Created.Compare(b.Snapshot.Created)
	})
	return list, nil
}

// notFound says that there is no snapshot of that name, and which name may have
// been meant.
func (s *Store) notFound(name string) error {
	names, err := s.Names()
	if err != nil {
		return fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	if near := nearest(name, names); near != "" {
		return fmt.Errorf("%w: %s; did you mean %s?", ErrNotFound, name, near)
	}
	return fmt.Errorf("%w: %s", ErrNotFound, name)
}

// Lease returns an open file whose lock keeps the snapshot from being removed.
// Let the VM's process inherit it: the kernel drops the lock when the last copy
// of the file is closed, whoever dies. A reader of the files who is no VM takes
// one as well, and closes it.
func (s *Store) Lease(name string) (*os.File, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	path := filepath.Join(s.dir, name, leaseFile)
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(filepath.Dir(path)); err == nil {
			return nil, fmt.Errorf("lease snapshot %s: %w: %s is missing", name, ErrDamaged, leaseFile)
		}
		return nil, s.notFound(name)
	}
	if err != nil {
		return nil, fmt.Errorf("lease snapshot %s: %w", name, err)
	}
	// Only a removal locks exclusively, so whoever fails here is too late. The
	// same goes for a lock on a file that was moved away meanwhile.
	err = flock(f, unix.LOCK_SH)
	if err == nil && !samePlace(f, path) {
		err = unix.EWOULDBLOCK
	}
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w: %s was just removed", ErrNotFound, name)
	}
	return nil, fmt.Errorf("lease snapshot %s: %w", name, err)
}

// Remove deletes a snapshot, also a damaged one. The error wraps ErrInUse while
// a lease is held.
func (s *Store) Remove(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	dir := filepath.Join(s.dir, name)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return s.notFound(name)
	}
	path := filepath.Join(dir, leaseFile)
	f, err := os.Open(path)
	switch {
	case err == nil:
		defer f.Close()
		if err := flock(f, unix.LOCK_EX); errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w: %s%s", ErrInUse, name, describeHolders(holders(path)))
		} else if err != nil {
			return fmt.Errorf("remove snapshot %s: %w", name, err)
		}
		if !samePlace(f, path) {
			return s.notFound(name)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("remove snapshot %s: %w", name, err)
	}
	// The name is free at once, and a removal that is cut off is finished by the
	// next Open.
	trash := filepath.Join(s.dir, fmt.Sprintf(".%s.%d%s", name, time.Now().UnixNano(), delSuffix))
	if err := os.Rename(dir, trash); errors.Is(err, fs.ErrNotExist) {
		return s.notFound(name)
	} else if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", name, err)
	}
	if err := os.RemoveAll(trash); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", name, err)
	}
	return syncDir(s.dir)
}

// sweep removes what creations and removals that were killed left behind.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("open snapshots: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		switch {
		case !strings.HasPrefix(e.Name(), "."):
		case strings.HasSuffix(e.Name(), delSuffix):
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("sweep snapshots: %w", err)
			}
		case strings.HasSuffix(e.Name(), newSuffix):
			d, err := os.Open(path)
			if err != nil {
				continue // its creation ended meanwhile
			}
			if flock(d, unix.LOCK_EX) == nil && samePlace(d, path) {
				err = os.RemoveAll(path)
			}
			d.Close()
			if err != nil {
				return fmt.Errorf("sweep snapshots: %w", err)
			}
		}
	}
	return nil
}

// FreeBytes is the space that this user may still fill in the store.
func (s *Store) FreeBytes() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("ask for free space in %s: %w", s.dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// flock locks without waiting. The lock belongs to the open file, so that it
// survives fork and exec, and ends with the last copy.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err != unix.EINTR {
			return err
		}
	}
}

// samePlace tells whether path still leads to the open file f.
func samePlace(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	defer d.Close()
	// Some file systems cannot sync a directory, and have no need to.
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// Progress is told of bytes done of a total, from the goroutine that called.
// It may be nil.
type Progress func(done, total int64)

func (p Progress) tell(done, total int64) {
	if p != nil {
		p(done, total)
	}
}

// Verify reads the whole snapshot and compares it with its checksums. The error
// wraps ErrDamaged where something differs.
func (s *Store) Verify(ctx context.Context, name string, progress Progress) error {
	snap, lease, err := s.leased(name)
	if err != nil {
		return err
	}
	defer lease.Close()
	return snap.verify(ctx, progress)
}

// Check makes sure that the snapshot can be used. It is cheap as long as the
// files' inodes and times are those under which their sums last matched; else
// it verifies once, and remembers. Call it while holding a lease.
func (s *Store) Check(ctx context.Context, snap *Snapshot, progress Progress) error {
	if snap.stamped() {
		return nil
	}
	return snap.verify(ctx, progress)
}

func (s *Store) leased(name string) (*Snapshot, *os.File, error) {
	lease, err := s.Lease(name)
	if err != nil {
		return nil, nil, err
	}
	snap, err := s.Get(name)
	if err != nil {
		lease.Close()
		return nil, nil, err
	}
	return snap, lease, nil
}
