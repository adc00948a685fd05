package guest

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/blakesmith/ar"
)

var (
	kernelEntry = regexp.MustCompile(`^boot/vmlinuz-([A-Za-z0-9][A-Za-z0-9.+~_-]*)$`)
	moduleEntry = regexp.MustCompile(`^(?:usr/)?lib/modules/[^/]+/(.+)$`)
)

// maxKernel bounds the size of a kernel image, in bytes.
const maxKernel = 256 << 20

// unpackDeb writes the kernel of a Debian package to dir/vmlinuz and its modules
// below dir/modules. A package of modules only has no kernel: the version is then
// empty. progress gets the bytes of the package that were read.
func unpackDeb(ctx context.Context, deb, dir string, progress func(done int64)) (version string, err error) {
	f, err := os.Open(deb)
	if err != nil {
		return "", fmt.Errorf("open package: %w", err)
	}
	defer f.Close()
	version, err = readDeb(ctx, &countReader{r: f, report: progress}, dir)
	if err != nil {
		return "", fmt.Errorf("unpack %s: %w", deb, err)
	}
	return version, nil
}

func readDeb(ctx context.Context, r io.Reader, dir string) (string, error) {
	archive := ar.NewReader(r)
	for first := true; ; first = false {
		h, err := nextMember(archive)
		if errors.Is(err, io.EOF) {
			return "", errors.New("it is no Debian package: it has no data.tar")
		}
		if err != nil {
			return "", fmt.Errorf("it is no Debian package: %w", err)
		}
		name := strings.TrimSuffix(h.Name, "/")
		if first && name != "debian-binary" {
			return "", errors.New("it is no Debian package: debian-binary is not its first member")
		}
		if !strings.HasPrefix(name, "data.tar") {
			continue
		}
		data, err := decompress(name, archive)
		if err != nil {
			return "", err
		}
		return unpackTar(ctx, data, dir)
	}
}

// nextMember wraps Reader.Next, which panics on a header that it cannot read.
func nextMember(r *ar.Reader) (h *ar.Header, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("malformed ar header: %v", p)
		}
	}()
	h, err = r.Next()
	if err == nil && (h == nil || h.Size < 0) {
		err = errors.New("malformed ar header")
	}
	return h, err
}

func unpackTar(ctx context.Context, r io.Reader, dir string) (version string, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	t := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return "", context.Cause(ctx)
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return version, nil
		}
		if err != nil {
			return "", fmt.Errorf("read data.tar: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "./"))
		if m := kernelEntry.FindStringSubmatch(name); m != nil {
			version = m[1]
			if err := writeEntry(root, "vmlinuz", t, maxKernel); err != nil {
				return "", err
			}
			continue
		}
		m := moduleEntry.FindStringSubmatch(name)
		if m == nil || !isModule(path.Base(name)) && path.Base(name) != "modules.builtin" {
			continue
		}
		// Flat, as the module's name is unique in a kernel.
		if err := root.MkdirAll("modules", 0o755); err != nil {
			return "", err
		}
		if err := writeEntry(root, filepath.Join("modules", path.Base(name)), t, maxModule); err != nil {
			return "", err
		}
	}
}

func writeEntry(root *os.Root, name string, r io.Reader, limit int64) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(r, limit+1))
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil && n > limit {
		err = fmt.Errorf("%s is over %d bytes", name, limit)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// countReader reports how much was read.
type countReader struct {
	r      io.Reader
	n      int64
	report func(int64)
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.report(c.n)
	return n, err
}
