package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/procmem"
)

// Draft is a snapshot that is being made.
type Draft struct {
	store *Store
	name  string
	dir   string
	mem   *os.File
	need  int64
}

// Create makes a snapshot. It claims the name, calls fill to write the memory
// and the state, and then checksums, syncs and publishes what fill wrote, none
// of which needs the VM to be paused. Whatever fails or is cancelled, nothing
// is left behind. The error wraps ErrName, ErrExists or ErrNoSpace where these
// are the cause.
func (s *Store) Create(ctx context.Context, name string, fill func(ctx context.Context, d *Draft) (Manifest, error)) (*Snapshot, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	lock, err := s.claim(name)
	if err != nil {
		return nil, err
	}
	// Closing drops the lock, so the directory must be gone or renamed by then.
	defer lock.Close()
	d := &Draft{store: s, name: name, dir: s.draftDir(name)}
	snap, err := s.create(ctx, d, fill)
	if d.mem != nil {
		err = errors.Join(err, d.mem.Close())
	}
	if err != nil {
		if rmErr := os.RemoveAll(d.dir); rmErr != nil {
			err = errors.Join(err, rmErr)
		}
		return nil, s.explain(err, d)
	}
	return snap, nil
}

func (s *Store) create(ctx context.Context, d *Draft, fill func(ctx context.Context, d *Draft) (Manifest, error)) (*Snapshot, error) {
	begun := time.Now()
	m, err := fill(ctx, d)
	if err != nil {
		return nil, err
	}
	if d.mem == nil {
		return nil, errors.New("no memory was written")
	}
	m.Schema, m.Name = SchemaVersion, d.name
	if m.Created.IsZero() {
		m.Created = begun
	}
	snap := &Snapshot{Manifest: m, Dir: d.dir}
	if err := snap.seal(ctx, d.mem); err != nil {
		return nil, err
	}
	final := filepath.Join(s.dir, d.name)
	// NOREPLACE: rename(2) replaces an empty directory without a word.
	err = unix.Renameat2(unix.AT_FDCWD, d.dir, unix.AT_FDCWD, final, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// A file system without the flag. The claim keeps all others of us away.
		err = os.Rename(d.dir, final)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: %s", ErrExists, d.name)
	}
	if err != nil {
		return nil, fmt.Errorf("publish: %w", err)
	}
	snap.Dir = final
	if err := syncDir(s.dir); err != nil {
		// It is published, and whole; a crash of the host may lose it. Taking it
		// back keeps "there whole or not at all" true for the caller.
		return nil, errors.Join(err, os.RemoveAll(final))
	}
	return snap, nil
}

func (s *Store) draftDir(name string) string {
	return filepath.Join(s.dir, "."+name+newSuffix)
}

// claim makes the draft's directory and locks it.
func (s *Store) claim(name string) (*os.File, error) {
	taken := fmt.Errorf("%w: %s", ErrExists, name)
	dir := s.draftDir(name)
	// A second round is needed only when another process swept or published
	// between our mkdir and our lock.
	for range 100 {
		if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
			return nil, taken
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("create snapshot %s: %w", name, err)
		}
		d, err := os.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("create snapshot %s: %w", name, err)
		}
		err = flock(d, unix.LOCK_EX)
		if errors.Is(err, unix.EWOULDBLOCK) {
			d.Close()
			return nil, fmt.Errorf("%w: %s is being created", ErrExists, name)
		}
		if err == nil && samePlace(d, dir) {
			// The lock is ours; published meanwhile, the name would be taken.
			if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
				err := os.RemoveAll(dir)
				d.Close()
				return nil, errors.Join(taken, err)
			}
			if err := empty(dir); err != nil {
				d.Close()
				return nil, fmt.Errorf("create snapshot %s: %w", name, err)
			}
			return d, nil
		}
		d.Close()
		if err != nil {
			return nil, fmt.Errorf("create snapshot %s: lock: %w", name, err)
		}
	}
	return nil, fmt.Errorf("%w: %s is being created", ErrExists, name)
}

// empty removes what a killed creation left in a draft's directory.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// Dir is the directory of the draft.
func (d *Draft) Dir() string { return d.dir }

// StatePath is where the device state has to be written. The file does not
// exist yet.
func (d *Draft) StatePath() string { return filepath.Join(d.dir, stateFile) }

// Reserve fails with ErrNoSpace when the disk has no room for this many more
// bytes. It keeps nothing free; it is there so that a VM is not paused for a
// snapshot that cannot fit.
func (d *Draft) Reserve(bytes int64) error {
	d.need += bytes
	free, err := d.store.FreeBytes()
	if err != nil {
		return err
	}
	if free < bytes {
		return fmt.Errorf("%w: %s needs %s in %s, and %s are free; remove snapshots or images", ErrNoSpace, d.name, mib(bytes), d.store.dir, mib(free))
	}
	return nil
}

// CreateMemory makes the memory file with size bytes, open for reading and
// writing; the draft closes it. With a parent it holds the parent's memory,
// shared with it where the file system can (reflinks), else copied; without
// one it is one hole. Call it before the VM is paused.
func (d *Draft) CreateMemory(ctx context.Context, size int64, parent *Snapshot) (*os.File, error) {
	if d.mem != nil {
		return nil, errors.New("create memory file: made already")
	}
	f, err := os.OpenFile(filepath.Join(d.dir, memoryFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create memory file: %w", err)
	}
	d.mem = f
	if parent == nil {
		if err := f.Truncate(size); err != nil {
			return nil, fmt.Errorf("create memory file: %w", err)
		}
		return f, nil
	}
	src, err := os.Open(parent.Memory())
	if err != nil {
		return nil, fmt.Errorf("open memory of snapshot %s: %w", parent.Name, err)
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return nil, fmt.Errorf("open memory of snapshot %s: %w", parent.Name, err)
	}
	if fi.Size() != size {
		return nil, fmt.Errorf("copy memory of snapshot %s: it has %d bytes, and the VM has %d", parent.Name, fi.Size(), size)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		d.need += st.Blocks * 512
	}
	if err := procmem.CloneParent(ctx, src, f); err != nil {
		return nil, fmt.Errorf("copy memory of snapshot %s: %w", parent.Name, err)
	}
	// Now, because the kernel makes who writes wait for the disk when much is
	// dirty, and the next who writes does it while the VM is paused.
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("copy memory of snapshot %s: %w", parent.Name, err)
	}
	return f, nil
}

// explain turns a full disk into words.
func (s *Store) explain(err error, d *Draft) error {
	if errors.Is(err, ErrExists) || errors.Is(err, ErrNoSpace) {
		return err
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		need := ""
		if d.need > 0 {
			need = fmt.Sprintf(" needs %s and", mib(d.need))
		}
		free := ""
		if n, ferr := s.FreeBytes(); ferr == nil {
			free = fmt.Sprintf(" (%s are free)", mib(n))
		}
		return fmt.Errorf("%w: snapshot %s%s does not fit into %s%s; remove snapshots or images: %w", ErrNoSpace, d.name, need, s.dir, free, err)
	}
	return fmt.Errorf("create snapshot %s: %w", d.name, err)
}

// mib prints a size for people, rounded up.
func mib(n int64) string {
	return fmt.Sprintf("%d MiB", (n+1<<20-1)>>20)
}
