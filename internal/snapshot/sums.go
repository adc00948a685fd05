package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"fcvm/internal/pagesum"
)

// pageSize of guest memory. mem.img is laid out and summed in these, whatever
// pages the host uses.
const pageSize = pagesum.PageSize

// sealFile syncs a file that is complete, and describes it.
func sealFile(f *os.File) (File, error) {
	fi, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	name := filepath.Base(f.Name())
	sum, err := sumOf(f, fi.Size())
	if err != nil {
		return File{}, err
	}
	if err := f.Sync(); err != nil {
		return File{}, fmt.Errorf("sync %s: %w", name, err)
	}
	return File{Name: name, Size: fi.Size(), Sum: sum}, nil
}

// sealMemory is sealFile for the memory file, and makes its page sums on the way.
func sealMemory(ctx context.Context, f *os.File) (File, *pagesum.Table, error) {
	fi, err := f.Stat()
	if err != nil {
		return File{}, nil, err
	}
	sum, table, err := sumMemory(ctx, f, fi.Size(), nil)
	if err != nil {
		return File{}, nil, err
	}
	if err := f.Sync(); err != nil {
		return File{}, nil, fmt.Errorf("sync %s: %w", memoryFile, err)
	}
	return File{Name: memoryFile, Size: fi.Size(), Sum: sum}, table, nil
}

// sumOf returns the SHA-256 of a file's first size bytes, in hexadecimal.
func sumOf(f *os.File, size int64) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return "", fmt.Errorf("checksum %s: %w", filepath.Base(f.Name()), err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// verifyMemory compares the memory file with both kinds of its sums. Where it
// changed, the page sums tell which page did.
func (s *Snapshot) verifyMemory(ctx context.Context, f *os.File, want File, progress Progress) error {
	stored, err := s.ReadPageSums()
	if err != nil {
		return err
	}
	sum, table, err := sumMemory(ctx, f, want.Size, progress)
	if err != nil {
		return err
	}
	for page := range table.Pages() {
		if table.Sum(page) != stored.Sum(page) {
			return fmt.Errorf("%w, at page %d (offset %#x)", changed(memoryFile), page, page*pageSize)
		}
	}
	if sum != want.Sum {
		return changed(memoryFile)
	}
	return nil
}

// ReadPageSums reads the checksums of the memory file's pages, which also tell
// which pages are zeros. The error wraps ErrDamaged when they are not what was
// written.
func (s *Snapshot) ReadPageSums() (*pagesum.Table, error) {
	f, err := os.Open(s.PageSums())
	if err != nil {
		return nil, fmt.Errorf("read page sums: %w", err)
	}
	defer f.Close()
	table, err := pagesum.Read(f, s.pages())
	if errors.Is(err, pagesum.ErrDamaged) {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(table.Bytes())
	for _, want := range s.Files {
		if want.Name == sumsFile && want.Sum != hex.EncodeToString(sum[:]) {
			return nil, changed(sumsFile)
		}
	}
	return table, nil
}

// sumMemory returns the sum of a memory file, see [File], and those of its pages.
// Both come of one pass: the CRC32C of a page costs a twentieth of its SHA-256,
// 10 ms of the 400 ms that a snapshot of a 512 MiB guest with 100 MiB in use takes
// after its pause.
func sumMemory(ctx context.Context, f *os.File, size int64, progress Progress) (string, *pagesum.Table, error) {
	h := sha256.New()
	table := pagesum.New((size + pageSize - 1) / pageSize)
	var number [8]byte
	err := dataPages(ctx, f, size, progress, func(page int64, data []byte) {
		sum := pagesum.Of(data)
		if sum == 0 { // zeros, and nothing else
			return
		}
		table.Set(page, sum)
		binary.LittleEndian.PutUint64(number[:], uint64(page))
		h.Write(number[:]) // a hash never returns an error
		h.Write(data)
	})
	if err != nil {
		return "", nil, fmt.Errorf("checksum %s: %w", memoryFile, err)
	}
	return hex.EncodeToString(h.Sum(nil)), table, nil
}

// dataPages calls yield for each page of a memory file that is not in a hole, in
// ascending order. The last page is short where the size is no multiple of pages.
func dataPages(ctx context.Context, f *os.File, size int64, progress Progress, yield func(page int64, data []byte)) error {
	buf := make([]byte, 1<<20)
	for pos := int64(0); pos < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		// Holes are not read. SEEK_DATA need not be supported: then all is data.
		data, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // only a hole is left
			data = size
		case err != nil:
			data = pos
		}
		pos = max(pos, data/pageSize*pageSize)
		if pos >= size {
			break
		}
		b := buf[:min(int64(len(buf)), size-pos)]
		n, err := f.ReadAt(b, pos)
		if n < len(b) {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("%w: it was truncated", ErrDamaged)
			}
			return err
		}
		for i := 0; i < len(b); i += pageSize {
			yield((pos+int64(i))/pageSize, b[i:min(i+pageSize, len(b))])
		}
		pos += int64(len(b))
		progress.tell(pos, size)
	}
	progress.tell(size, size)
	return nil
}
