package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// seal completes a draft whose files were written: sums, stamp, manifest, lease,
// everything synced.
func (s *Snapshot) seal(ctx context.Context, mem *os.File) error {
	state, err := os.Open(s.State())
	if err != nil {
		return fmt.Errorf("open device state: %w", err)
	}
	defer state.Close()
	memory, table, err := sealMemory(ctx, mem)
	if err != nil {
		return err
	}
	if err := writeSynced(s.PageSums(), table.Bytes()); err != nil {
		return fmt.Errorf("write page sums: %w", err)
	}
	device, err := sealFile(state)
	if err != nil {
		return err
	}
	sums := sha256.Sum256(table.Bytes())
	s.Files = []File{memory, device, {Name: sumsFile, Size: int64(len(table.Bytes())), Sum: hex.EncodeToString(sums[:])}}
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
	// The smallest first: whoever waits for a bad word about them need not wait for
	// the memory.
	for _, want := range slices.Backward(s.Files) {
		err := s.verifyFile(ctx, want, func(n, _ int64) { progress.tell(done+n, total) })
		if err != nil {
			return fmt.Errorf("verify snapshot %s: %w", s.Name, err)
		}
		done += want.Size
	}
	// Where the stamp cannot be kept, the next Check only takes longer.
	_ = s.replaceStamp(stamp)
	return nil
}

func (s *Snapshot) verifyFile(ctx context.Context, want File, progress Progress) error {
	f, err := os.Open(filepath.Join(s.Dir, want.Name))
	if err != nil {
		return err
	}
	defer f.Close()
	if want.Name == memoryFile {
		return s.verifyMemory(ctx, f, want, progress)
	}
	sum, err := sumOf(f, want.Size)
	if err != nil {
		return err
	}
	if sum != want.Sum {
		return changed(want.Name)
	}
	progress.tell(want.Size, want.Size)
	return nil
}

func changed(name string) error {
	return fmt.Errorf("%w: the content of %s changed", ErrDamaged, name)
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
