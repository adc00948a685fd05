package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// pageSize of guest memory. mem.img is laid out and summed in these, whatever
// pages the host uses.
const pageSize = 4096

// seal completes a draft whose files were written: sums, stamp, manifest, lease,
// everything synced.
func (s *Snapshot) seal(ctx context.Context, mem *os.File) error {
	state, err := os.Open(s.State())
	if err != nil {
		return fmt.Errorf("open device state: %w", err)
	}
	defer state.Close()
	s.Files = nil
	for _, f := range []*os.File{mem, state} {
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		sum, err := sumOf(ctx, f, fi.Size(), nil)
		if err != nil {
			return err
		}
		s.Files = append(s.Files, File{Name: filepath.Base(f.Name()), Size: fi.Size(), Sum: sum})
		if err := f.Sync(); err != nil {
			return fmt.Errorf("sync %s: %w", filepath.Base(f.Name()), err)
		}
	}
	b, err := s.encode()
	if err != nil {
		return err
	}
	// What cannot be read back must not be published.
	if _, err := ParseManifest(bytes.NewReader(b)); err != nil {
		return fmt.Errorf("check manifest: %w", err)
	}
	if err := writeSynced(filepath.Join(s.Dir, manifestFile), b); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(s.Dir, leaseFile), nil); err != nil {
		return err
	}
	if err := s.writeStamp(); err != nil {
		return err
	}
	return syncDir(s.Dir)
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// verify compares all files with their sums, and stamps them when they match.
func (s *Snapshot) verify(ctx context.Context, progress Progress) error {
	// The stamp is of the time before the reading: what changes meanwhile is not
	// vouched for.
	stamp, err := s.stamp()
	if err != nil {
		return fmt.Errorf("verify snapshot %s: %w", s.Name, err)
	}
	if err := s.checkSizes(); err != nil {
		return fmt.Errorf("verify snapshot %s: %w", s.Name, err)
	}
	var total, done int64
	for _, f := range s.Files {
		total += f.Size
	}
	for _, want := range s.Files {
		f, err := os.Open(filepath.Join(s.Dir, want.Name))
		if err != nil {
			return fmt.Errorf("verify snapshot %s: %w", s.Name, err)
		}
		sum, err := sumOf(ctx, f, want.Size, func(n, _ int64) { progress.tell(done+n, total) })
		f.Close()
		if err != nil {
			return fmt.Errorf("verify snapshot %s: %w", s.Name, err)
		}
		if sum != want.Sum {
			return fmt.Errorf("verify snapshot %s: %w: the content of %s changed", s.Name, ErrDamaged, want.Name)
		}
		done += want.Size
	}
	// Where the stamp cannot be kept, the next Check only takes longer.
	_ = s.replaceStamp(stamp)
	return nil
}

// sumOf computes the checksum of a snapshot's file, see [File]. The name decides
// how.
func sumOf(ctx context.Context, f *os.File, size int64, progress Progress) (string, error) {
	h := sha256.New()
	var err error
	if filepath.Base(f.Name()) == memoryFile {
		err = sumPages(ctx, h, f, size, progress)
	} else if _, err = io.Copy(h, io.NewSectionReader(f, 0, size)); err == nil {
		progress.tell(size, size)
	}
	if err != nil {
		return "", fmt.Errorf("checksum %s: %w", filepath.Base(f.Name()), err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func sumPages(ctx context.Context, h io.Writer, f *os.File, size int64, progress Progress) error {
	buf := make([]byte, 1<<20)
	zero := make([]byte, pageSize)
	var number [8]byte
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
			page := b[i:min(i+pageSize, len(b))]
			if bytes.Equal(page, zero[:len(page)]) {
				continue
			}
			binary.LittleEndian.PutUint64(number[:], uint64(pos+int64(i))/pageSize)
			if _, err := h.Write(number[:]); err != nil {
				return err
			}
			if _, err := h.Write(page); err != nil {
				return err
			}
		}
		pos += int64(len(b))
		progress.tell(pos, size)
	}
	progress.tell(size, size)
	return nil
}

// stampEntry identifies a file's content without reading it: whoever writes to
// the file changes its ctime, which no system call sets back.
type stampEntry struct {
	Name  string `json:"name"`
	Inode uint64 `json:"inode"`
	Size  int64  `json:"size"`
	Mtime int64  `json:"mtime_ns"`
	Ctime int64  `json:"ctime_ns"`
}

type stamp struct {
	// Sum is the manifest's, so that the stamp goes with its checksums.
	Sum   string       `json:"sum"`
	Files []stampEntry `json:"files"`
}

// stamp describes the files as they are now.
func (s *Snapshot) stamp() (stamp, error) {
	out := stamp{Sum: s.Sum}
	for _, f := range s.Files {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(s.Dir, f.Name), &st); err != nil {
			return stamp{}, fmt.Errorf("look at %s: %w", f.Name, err)
		}
		out.Files = append(out.Files, stampEntry{Name: f.Name, Inode: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()})
	}
	return out, nil
}

// stamped tells whether the files are those whose sums matched.
func (s *Snapshot) stamped() bool {
	now, err := s.stamp()
	if err != nil {
		return false
	}
	want, err := json.Marshal(now)
	if err != nil {
		return false
	}
	f, err := os.Open(filepath.Join(s.Dir, stampFile))
	if err != nil {
		return false
	}
	defer f.Close()
	// No parser: the stamp is right only if it is the very bytes that would be
	// written now.
	got, err := io.ReadAll(io.LimitReader(f, int64(len(want))+1))
	return err == nil && bytes.Equal(got, want)
}

func (s *Snapshot) writeStamp() error {
	st, err := s.stamp()
	if err != nil {
		return err
	}
	return s.replaceStamp(st)
}

func (s *Snapshot) replaceStamp(st stamp) error {
	b, err := json.Marshal(st)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.Dir, ".verified-")
	if err != nil {
		return fmt.Errorf("stamp: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.Dir, stampFile))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("stamp: %w", err), os.Remove(f.Name()))
	}
	return nil
}
