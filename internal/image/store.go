package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"fcvm/internal/flock"
)

// Names in the store's directory.
const (
	refsFile     = "refs.json"
	refsLock     = ".refs.lock"
	locksDir     = ".locks" // one lock per digest that is being pulled
	tempDir      = ".tmp"   // what is being made or removed
	tempLock     = ".tmp.lock"
	manifestFile = "manifest.json"
	rootfsFile   = "rootfs.erofs"
	leaseFile    = "lease"
)

// schemaVersion of refs.json and manifest.json.
const schemaVersion = 1

// Store is a directory of images. Its methods may be called concurrently, also
// by several processes.
//
// Locks are waited for in this order: digest, refs. The lock on tempDir is shared
// by all who have something in there, and taken alone, as leases are, only by
// those who don't wait for it.
type Store struct {
	dir string
	// backoff between attempts to reach a registry.
	backoff remote.Backoff
	// stall is how long a registry may send nothing in the middle of a layer.
	stall time.Duration
}

// Open opens the store in dir and makes it where it is missing. What processes
// that were killed left half made is removed, unless another is at work.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	for _, d := range []string{dir, filepath.Join(dir, locksDir), filepath.Join(dir, tempDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
	}
	s := &Store{
		dir:     dir,
		backoff: remote.Backoff{Duration: time.Second, Factor: 3, Jitter: 0.1, Steps: 3},
		stall:   time.Minute,
	}
	return s, s.sweep()
}

// sweep empties tempDir if nobody works in it.
func (s *Store) sweep() error {
	old, err := os.ReadDir(s.path(tempDir))
	if err != nil {
		return fmt.Errorf("sweep image store: %w", err)
	}
	if len(old) == 0 {
		return nil
	}
	f, err := os.OpenFile(s.path(tempLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("sweep image store: %w", err)
	}
	defer func() { _ = f.Close() }()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil
	}
	for _, e := range old {
		if err := os.RemoveAll(s.path(tempDir, e.Name())); err != nil {
			return fmt.Errorf("sweep image store: %w", err)
		}
	}
	return nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// stage makes a directory in tempDir. The function that it returns removes it.
func (s *Store) stage(ctx context.Context) (string, func(), error) {
	lock, err := flock.Open(ctx, s.path(tempLock), unix.LOCK_SH, nil)
	if err != nil {
		return "", nil, err
	}
	dir, err := os.MkdirTemp(s.path(tempDir), "new-")
	if err != nil {
		_ = lock.Close()
		return "", nil, fmt.Errorf("make temporary directory: %w", err)
	}
	return dir, func() {
		_ = os.RemoveAll(dir)
		_ = lock.Close()
	}, nil
}

// lockDigest waits until no other process works on this image.
func (s *Store) lockDigest(ctx context.Context, id string, onWait func()) (unlock func(), err error) {
	path := s.path(locksDir, dirName(id))
	for {
		f, err := flock.Open(ctx, path, unix.LOCK_EX, onWait)
		if err != nil {
			return nil, err
		}
		// The one who had it removed the file, so that none are left over.
		// Then the lock on the old one means nothing.
		if sameFile(f, path) {
			return func() {
				_ = os.Remove(path)
				_ = f.Close()
			}, nil
		}
		_ = f.Close()
	}
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// dirName is the name of the directory of an image.
func dirName(id string) string { return strings.Replace(id, ":", "-", 1) }

var (
	idPattern     = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	dirPattern    = regexp.MustCompile(`^sha256-[0-9a-f]{64}$`)
	prefixPattern = regexp.MustCompile(`^(sha256:)?[0-9a-f]{4,64}$`)
)

// record is manifest.json: what the store knows about an image.
type record struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	// Manifest and Config are the image's own, byte for byte.
	Manifest []byte    `json:"manifest"`
	Config   []byte    `json:"config"`
	Size     int64     `json:"size_bytes"`
	Pulled   time.Time `json:"pulled"`
}

// read returns the image with this ID, with the given names.
func (s *Store) read(id string, refs map[string]string) (*Image, error) {
	b, err := os.ReadFile(s.path(dirName(id), manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("find image %s: %w", id, ErrUnknown)
	}
	if err != nil {
		return nil, fmt.Errorf("read image %s: %w", id, err)
	}
	var r record
	var cfg *v1.ConfigFile
	if err = json.Unmarshal(b, &r); err == nil {
		cfg, err = parseConfig(r.Config)
	}
	if err == nil && (r.Version != schemaVersion || r.ID != id) {
		err = fmt.Errorf("it is of version %d and says it is %q", r.Version, r.ID)
	}
	if err != nil {
		return nil, fmt.Errorf("read image %s: %w: %w; remove it (`fcvm image rm %s`) and pull it again", id, ErrCorrupt, err, id)
	}
	img := &Image{
		ID: id, RootFS: s.path(dirName(id), rootfsFile), Config: *cfg,
		Size: r.Size, Created: cfg.Created.Time, Pulled: r.Pulled,
	}
	for name, to := range refs {
		if to == id {
			img.Refs = append(img.Refs, shortName(name))
		}
	}
	slices.Sort(img.Refs)
	fi, err := os.Stat(img.RootFS)
	if err != nil || fi.Size() != r.Size {
		return nil, fmt.Errorf("read image %s: %w: its file system is missing or cut short; remove it (`fcvm image rm %s`) and pull it again", id, ErrCorrupt, id)
	}
	return img, nil
}

// Get finds an image by name, by ID, or by the first hex digits of an ID, at
// least four. The error wraps ErrUnknown, ErrAmbiguous or ErrReference.
func (s *Store) Get(refOrID string) (*Image, error) {
	refs, err := s.readRefs()
	if err != nil {
		return nil, err
	}
	id, _, err := s.find(refOrID, refs)
	if err != nil {
		return nil, err
	}
	return s.read(id, refs)
}

// find returns the ID, and the full name when it was found by name.
func (s *Store) find(refOrID string, refs map[string]string) (id, full string, err error) {
	ref, err := parseReference(refOrID)
	if err == nil {
		if id, ok := refs[ref.String()]; ok {
			return id, ref.String(), nil
		}
	}
	if prefixPattern.MatchString(refOrID) {
		ids, lerr := s.ids()
		if lerr != nil {
			return "", "", lerr
		}
		want := "sha256:" + strings.TrimPrefix(refOrID, "sha256:")
		ids = slices.DeleteFunc(ids, func(id string) bool { return !strings.HasPrefix(id, want) })
		switch len(ids) {
		case 1:
			return ids[0], "", nil
		case 0:
		default:
			return "", "", fmt.Errorf("find image %s: %w: %d images start with it; give more digits", refOrID, ErrAmbiguous, len(ids))
		}
		return "", "", fmt.Errorf("find image %s: %w; `fcvm image ls` lists them", refOrID, ErrUnknown)
	}
	if err != nil {
		return "", "", err
	}
	return "", "", fmt.Errorf("find image %s: %w here; get it with `fcvm image pull %s`", refOrID, ErrUnknown, refOrID)
}

// ids lists the images that are whole.
func (s *Store) ids() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if dirPattern.MatchString(e.Name()) {
			ids = append(ids, strings.Replace(e.Name(), "-", ":", 1))
		}
	}
	return ids, nil
}

// List returns all images, the youngest in the store first. One that can't be
// read is left out, and the error tells of it; the others are returned with it.
func (s *Store) List() ([]*Image, error) {
	refs, err := s.readRefs()
	if err != nil {
		return nil, err
	}
	ids, err := s.ids()
	if err != nil {
		return nil, err
	}
	var all []*Image
	var errs []error
	for _, id := range ids {
		img, err := s.read(id, refs)
		switch {
		case errors.Is(err, ErrUnknown): // removed since
		case err != nil:
			errs = append(errs, err)
		default:
			all = append(all, img)
		}
	}
	slices.SortFunc(all, func(a, b *Image) int {
		if c := b.Pulled.Compare(a.Pulled); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all, errors.Join(errs...)
}
