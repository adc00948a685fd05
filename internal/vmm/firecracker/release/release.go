// Package release installs a release of Firecracker, and its jailer, into a
// directory where the engine finds them.
//
// [Install] makes them, [Open] finds them. The files' directory is named by what they
// came from and never changes, so that a VM may be started while an install is under
// way.
package release

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"fcvm/internal/download"
	"fcvm/internal/flock"
)

// Version is the release that [Install] downloads: the newest that fcvm is tested
// with.
const Version = "1.16.1"

// archiveSum is the SHA-256 of its archive for x86-64, as the project publishes it
// beside the archive (its name with .sha256.txt). More than five public repositories that pin
// this release name the same.
const archiveSum = "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6"

// URL is where the archive is published.
const URL = "https://github.com/firecracker-microvm/firecracker/releases/download/v" + Version + "/firecracker-v" + Version + "-x86_64.tgz"

// maxArchive and maxProgram bound what is read, in bytes, to many times what a release
// has.
const (
	maxArchive = 256 << 20
	maxProgram = 128 << 20
)

// ErrNone is wrapped when no Firecracker was installed.
var ErrNone = errors.New("no Firecracker is set up; run `fcvm setup --engine firecracker`")

// Options say what to install, and where.
type Options struct {
	// Dir is made, see datadir.Layout.Firecracker.
	Dir string
	// Archive is a file or a URL (http, https) with the release; empty means [URL]. Its
	// SHA-256 is checked in any case.
	Archive string
	// Program is a Firecracker that is there already, to be used instead of a release. It
	// stays where it is.
	Program string
	// Progress is told what is done; total is 0 when it is not known.
	Progress func(stage string, done, total int64)

	pin pin // what to install; tests have another
}

// pin is a release that may be installed.
type pin struct{ version, sum string }

// Installed is what [Install] has made.
type Installed struct {
	// Version of a release; empty where Program was given.
	Version string `json:"version,omitempty"`
	// Archive is the SHA-256 of the release, in hexadecimal; empty likewise.
	Archive string `json:"archive_sha256,omitempty"`
	// Firecracker and Jailer are absolute paths. Without a jailer, VMs cannot be jailed.
	Firecracker string `json:"firecracker"`
	Jailer      string `json:"jailer,omitempty"`
	// Sums are the SHA-256 of these files, by path; of a release only.
	Sums map[string]string `json:"sha256,omitempty"`
}

const (
	manifestName = "release.json"
	partName     = ".download-" // and the archive's sum
	tempPrefix   = ".setup-"
)

// Open returns what an earlier [Install] left in dir. It checks that the programs are
// there, not what they are. The error wraps [ErrNone] when there is none.
func Open(dir string) (*Installed, error) {
	b, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, fmt.Errorf("find Firecracker: %w", err)
	}
	i := new(Installed)
	if err := json.Unmarshal(b, i); err != nil {
		return nil, fmt.Errorf("find Firecracker: %s: %w: %w", filepath.Join(dir, manifestName), err, ErrNone)
	}
	for _, p := range []string{i.Firecracker, i.Jailer} {
		if p == "" && i.Firecracker != "" {
			continue
		}
		if err := program(p); err != nil {
			return nil, fmt.Errorf("find Firecracker: %w: %w", err, ErrNone)
		}
	}
	return i, nil
}

// program checks that there is one.
func program(p string) error {
	fi, err := os.Stat(p)
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0 {
		return fmt.Errorf("%s is not a program", p)
	}
	return nil
}

// verify compares the files with their sums.
func (i *Installed) verify() error {
	for p, want := range i.Sums {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", p, err)
		}
		if hex.EncodeToString(h.Sum(nil)) != want {
			return fmt.Errorf("%s has changed", p)
		}
	}
	return nil
}

// Install installs what o names, if it is not there yet. It changes all or nothing.
// A download that was interrupted goes on where it was. Of installs into one directory
// at the same time, one works and the others wait for it.
func Install(ctx context.Context, o Options) (*Installed, error) {
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	if o.pin == (pin{}) {
		o.pin = pin{Version, archiveSum}
	}
	if o.Program != "" && o.Archive != "" {
		return nil, errors.New("set up Firecracker: choose one of a release and a program")
	}
	i, err := install(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("set up Firecracker: %w", err)
	}
	return i, nil
}

func install(ctx context.Context, o Options) (*Installed, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	o.Dir = dir
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := flock.Open(ctx, filepath.Join(o.Dir, "setup.lock"), unix.LOCK_EX, func() { o.Progress("wait for another setup", 0, 0) })
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	next, err := o.next(ctx)
	if err != nil {
		return nil, err
	}
	if err := save(o.Dir, next); err != nil {
		return nil, err
	}
	prune(o.Dir, next)
	o.Progress("done", 1, 1)
	return Open(o.Dir)
}

// next makes what is to be used from now on.
func (o *Options) next(ctx context.Context) (*Installed, error) {
	if o.Program != "" {
		p, err := filepath.Abs(o.Program)
		if err != nil {
			return nil, err
		}
		if err := program(p); err != nil {
			return nil, err
		}
		return &Installed{Firecracker: p, Jailer: JailerOf(p)}, nil
	}
	o.Progress("check Firecracker", 0, 0)
	if cur, err := Open(o.Dir); err == nil && cur.Archive == o.pin.sum && cur.verify() == nil {
		return cur, nil
	}
	archive, err := o.archive(ctx)
	if err != nil {
		return nil, err
	}
	next, err := o.unpack(ctx, archive)
	if o.local() || err != nil {
		return next, err
	}
	return next, os.Remove(archive)
}

// JailerOf returns the jailer that belongs to a Firecracker: the program beside it that
// has "jailer" in its name instead of "firecracker", or "" where there is none.
func JailerOf(firecracker string) string {
	if real, err := filepath.EvalSymlinks(firecracker); err == nil {
		firecracker = real
	}
	dir, name := filepath.Split(firecracker)
	p := dir + strings.Replace(name, "firecracker", "jailer", 1)
	if p == firecracker || program(p) != nil {
		return ""
	}
	return p
}

func (o *Options) local() bool {
	return o.Archive != "" && !strings.HasPrefix(o.Archive, "http://") && !strings.HasPrefix(o.Archive, "https://")
}

// archive returns the path of the release, which is checked.
func (o *Options) archive(ctx context.Context) (string, error) {
	if o.local() {
		return o.Archive, checkSum(o.Archive, o.pin)
	}
	p := filepath.Join(o.Dir, partName+o.pin.sum[:16])
	err := download.Fetch(ctx, download.File{
		URL: cmp.Or(o.Archive, URL), Path: p, SHA256: o.pin.sum, Limit: maxArchive,
		Progress: func(done, total int64) { o.Progress("download Firecracker "+o.pin.version, done, total) },
	})
	if errors.Is(err, download.ErrUnreachable) {
		err = fmt.Errorf("%w; without a network, get %s elsewhere, and name the file with --release", err, path.Base(URL))
	}
	return p, err
}

func checkSum(file string, want pin) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("read release: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("read release %s: %w", file, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want.sum {
		return fmt.Errorf("%s is not the archive of Firecracker %s for x86-64: its SHA-256 is %s, not %s; --firecracker takes a program of another version",
			file, want.version, got, want.sum)
	}
	return nil
}

// unpack makes the directory with the programs of an archive.
func (o *Options) unpack(ctx context.Context, archive string) (*Installed, error) {
	o.Progress("unpack Firecracker", 0, 0)
	f, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tmp, err := os.MkdirTemp(o.Dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	sums, err := readArchive(ctx, f, tmp, o.pin.version)
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", archive, err)
	}
	dir := filepath.Join(o.Dir, "v"+o.pin.version+"-"+o.pin.sum[:16])
	next := &Installed{
		Version: o.pin.version, Archive: o.pin.sum,
		Firecracker: filepath.Join(dir, firecrackerName), Jailer: filepath.Join(dir, jailerName), Sums: map[string]string{},
	}
	for name, sum := range sums {
		next.Sums[filepath.Join(dir, name)] = sum
	}
	// A damaged one is in the way.
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return nil, err
	}
	return next, os.Rename(tmp, dir)
}

// Names of the installed programs: the jailer calls its jails by Firecracker's.
const (
	firecrackerName = "firecracker"
	jailerName      = "jailer"
)

// readArchive writes the two programs of a release's archive to dir, and returns their
// SHA-256 by name.
func readArchive(ctx context.Context, r io.Reader, dir, version string) (map[string]string, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = z.Close() }() // nothing of it is read any more
	names := map[string]string{}
	for _, n := range []string{firecrackerName, jailerName} {
		names["release-v"+version+"-x86_64/"+n+"-v"+version+"-x86_64"] = n
	}
	sums := map[string]string{}
	for t := tar.NewReader(z); ; {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		n := names[path.Clean(h.Name)]
		if n == "" || h.Typeflag != tar.TypeReg {
			continue
		}
		if sums[n], err = writeProgram(filepath.Join(dir, n), t); err != nil {
			return nil, err
		}
	}
	for want, n := range names {
		if sums[n] == "" {
			return nil, fmt.Errorf("it holds no %s", want)
		}
	}
	return sums, nil
}

func writeProgram(p string, r io.Reader) (string, error) {
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, maxProgram+1))
	if err == nil && n > maxProgram {
		err = fmt.Errorf("%s is over %d bytes", filepath.Base(p), maxProgram)
	}
	if err == nil {
		err = f.Sync()
	}
	return hex.EncodeToString(h.Sum(nil)), errors.Join(err, f.Close())
}

// save writes the manifest, which makes what it names count.
func save(dir string, i *Installed) error {
	b, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails when it was renamed
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, manifestName)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// prune removes what is not in use any more: a running VM has no need of its
// program's file.
func prune(dir string, i *Installed) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // nothing depends on it
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		old := strings.HasPrefix(e.Name(), "v") && p != filepath.Dir(i.Firecracker)
		if old || strings.HasPrefix(e.Name(), tempPrefix) || strings.HasPrefix(e.Name(), partName) {
			os.RemoveAll(p)
		}
	}
}
