package guest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ulikunitz/xz"

	"fcvm/internal/download"
)

// Where kernels come from on machines without apt. The suite is the one that
// fcvm is tested with; the mirror is asked over TLS, which is what its Release file is
// trusted for.
const (
	DefaultMirror = "https://deb.debian.org/debian"
	DefaultSuite  = "bookworm"
)

const (
	packagesFile = "main/binary-amd64/Packages.xz"
	// maxIndex bounds the indexes, in bytes.
	maxIndex = 64 << 20
	// maxDeb bounds the package, in bytes.
	maxDeb = 512 << 20
)

// downloadMirror finds the kernel in a mirror's indexes, and downloads it. Each
// file's SHA-256 is checked against the index before it: Release, Packages,
// package.
func downloadMirror(ctx context.Context, o SetupOptions, dir string) (string, error) {
	base, suite := strings.TrimSuffix(o.Mirror, "/"), o.Suite
	if base == "" {
		base = DefaultMirror
	}
	if suite == "" {
		suite = DefaultSuite
	}
	dist := base + "/dists/" + suite + "/"
	o.Progress("download package index", 0, 0)
	release, err := fetch(ctx, dist+"Release")
	if err != nil {
		return "", err
	}
	sum, err := releaseSum(release, packagesFile)
	if err != nil {
		return "", fmt.Errorf("%sRelease: %w", dist, err)
	}
	index, err := fetch(ctx, dist+packagesFile)
	if err != nil {
		return "", err
	}
	if got := sha256.Sum256(index); hex.EncodeToString(got[:]) != sum {
		return "", fmt.Errorf("%s%s: its SHA-256 is not what Release says; the mirror may be changing, try again", dist, packagesFile)
	}
	x, err := xz.NewReader(bytes.NewReader(index))
	if err != nil {
		return "", fmt.Errorf("unpack package index: %w", err)
	}
	all, err := parseStanzas(x, func(name string) bool { return strings.HasPrefix(name, "linux-image-") })
	if err != nil {
		return "", fmt.Errorf("unpack package index: %w", err)
	}
	meta := o.metaPackages()[0]
	name := firstWithPrefix(dependencies(all[meta]["Depends"]), "linux-image-")
	pkg := all[name]
	if pkg == nil {
		return "", fmt.Errorf("%s has no package that %s depends on; name another suite, or a package with --kernel-deb", dist, meta)
	}
	file := filepath.Join(dir, path.Base(pkg["Filename"]))
	if !strings.HasSuffix(file, ".deb") {
		return "", fmt.Errorf("package index: %s has the file name %q", name, pkg["Filename"])
	}
	total, err := strconv.ParseInt(pkg["Size"], 10, 64)
	if err != nil || total <= 0 || total > maxDeb {
		return "", fmt.Errorf("package index: %s has the size %q", name, pkg["Size"])
	}
	err = fetchPackage(ctx, o, base+"/"+pkg["Filename"], file, pkg["SHA256"], total, func(done, total int64) {
		o.Progress("download "+name, done, total)
	})
	if err != nil {
		return "", err
	}
	return file, nil
}

// releaseSum finds a file in the SHA256 list of a Release file.
func releaseSum(release []byte, file string) (string, error) {
	in := false
	s := bufio.NewScanner(bytes.NewReader(release))
	for s.Scan() {
		line := s.Text()
		if !strings.HasPrefix(line, " ") {
			in = strings.HasPrefix(line, "SHA256:")
			continue
		}
		if f := strings.Fields(line); in && len(f) == 3 && f[2] == file {
			return f[0], nil
		}
	}
	if err := s.Err(); err != nil {
		return "", err
	}
	return "", fmt.Errorf("it does not list %s", file)
}

// fetch returns one of the indexes.
func fetch(ctx context.Context, url string) ([]byte, error) {
	b, err := download.Get(ctx, url, maxIndex)
	return b, advise(err)
}

// fetchPackage downloads a package to file. What came so far is kept in o.Dir, for
// the next setup.
func fetchPackage(ctx context.Context, o SetupOptions, url, file, sum string, size int64, progress func(done, total int64)) error {
	if !validDigest(digestPrefix + sum) {
		return fmt.Errorf("package index: %s has the SHA-256 %q", path.Base(url), sum)
	}
	kept := filepath.Join(o.Dir, downloadPrefix+sum[:16])
	err := download.Fetch(ctx, download.File{URL: url, Path: kept, SHA256: sum, Size: size, Progress: progress})
	if err != nil {
		return advise(err)
	}
	return os.Rename(kept, file)
}

func advise(err error) error {
	if errors.Is(err, download.ErrUnreachable) {
		return fmt.Errorf("%w; without a network, give a package with --kernel-deb", err)
	}
	return err
}
