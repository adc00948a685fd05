package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// inflate returns r uncompressed. What it is shows in the first bytes; media
// types lie too often.
func inflate(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 256<<10)
	head, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, err
		}
		return z, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// A window of more than 128 MiB is nothing that a layer needs.
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// openArchive unpacks an archive of a layout into dir.
func openArchive(ctx context.Context, f *os.File, dir string, r reference, platform v1.Platform) ([]named, error) {
	z, err := inflate(f)
	if err != nil {
		return nil, fmt.Errorf("read archive: %w: %w", ErrCorrupt, err)
	}
	defer func() { _ = z.Close() }()
	if err := unpackLayout(ctx, z, dir); err != nil {
		return nil, err
	}
	return ociLayout{dir}.images(ctx, r, platform)
}

// openDocker reads an archive of `docker save` where it lies, or uncompressed in
// dir. The done that it returns releases what the given one does, and more.
func openDocker(ctx context.Context, f *os.File, dir string, r reference, platform v1.Platform, done func()) ([]named, func(), error) {
	z, err := inflate(f)
	if err != nil {
		return nil, done, fmt.Errorf("read archive: %w: %w", ErrCorrupt, err)
	}
	defer func() { _ = z.Close() }()
	if isCompressed(f) {
		path := filepath.Join(dir, "archive.tar")
		if err := unpackFile(ctx, z, path); err != nil {
			return nil, done, fmt.Errorf("read archive: %w", err)
		}
		plain, err := os.Open(path)
		if err != nil {
			return nil, done, fmt.Errorf("read archive: %w", err)
		}
		before := done
		f, done = plain, func() { _ = plain.Close(); before() }
	} else if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, done, fmt.Errorf("read archive: %w", err)
	}
	a, err := openSaved(ctx, f)
	if err != nil {
		return nil, done, err
	}
	images, err := a.images(ctx, r, platform)
	return images, done, err
}

func isCompressed(f *os.File) bool {
	var head [4]byte
	_, err := f.ReadAt(head[:], 0)
	return err == nil && (bytes.HasPrefix(head[:], []byte{0x1f, 0x8b}) || bytes.Equal(head[:], []byte{0x28, 0xb5, 0x2f, 0xfd}))
}

// detect finds out what kind of image lies at path.
func detect(path string) (reference, error) {
	for _, p := range []string{layoutPrefix, ociArchive, dockerArchive} {
		if strings.HasPrefix(path, p) {
			return parseReference(path)
		}
	}
	fi, err := os.Stat(path)
	if err != nil {
		return reference{}, fmt.Errorf("open archive: %w", err)
	}
	if fi.IsDir() {
		return parseReference(layoutPrefix + path)
	}
	f, err := os.Open(path)
	if err != nil {
		return reference{}, fmt.Errorf("open archive: %w", err)
	}
	defer func() { _ = f.Close() }()
	z, err := inflate(f)
	if err != nil {
		return reference{}, fmt.Errorf("read archive: %w: %w", ErrCorrupt, err)
	}
	defer func() { _ = z.Close() }()
	found := ""
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return reference{}, fmt.Errorf("read archive: %w: %w", ErrCorrupt, err)
		}
		switch filepath.Clean(h.Name) {
		case "index.json":
			// Newer versions of docker write both; this one has the digests
			// under which the image is known elsewhere.
			return parseReference(ociArchive + path)
		case archiveManifest:
			found = dockerArchive
		}
	}
	if found == "" {
		return reference{}, fmt.Errorf("%w: %s is neither an OCI archive nor one of `docker save`", ErrCorrupt, path)
	}
	return parseReference(found + path)
}

// spoolStdin returns a path that can be read twice.
func (s *Store) spoolStdin(ctx context.Context, path string) (string, func(), error) {
	if path != "-" {
		return path, func() {}, nil
	}
	dir, cleanup, err := s.stage(ctx)
	if err != nil {
		return "", nil, err
	}
	path = filepath.Join(dir, "stdin.tar")
	if err := unpackFile(ctx, os.Stdin, path); err != nil {
		cleanup()
		return "", nil, fmt.Errorf("read standard input: %w", err)
	}
	return path, cleanup, nil
}
