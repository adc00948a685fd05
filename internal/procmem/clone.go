package procmem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copyStep is how much is copied between two looks at the context.
const copyStep = 16 << 20

// CloneParent makes dst hold what src holds: by sharing the blocks where the
// file system can (ioctl_ficlone(2)), else by copying, holes left holes. dst is
// an empty file open for writing. src must not change meanwhile; its file
// position does.
func CloneParent(ctx context.Context, src, dst *os.File) error {
	fi, err := src.Stat()
	if err != nil {
		return fmt.Errorf("copy memory file: %w", err)
	}
	size := fi.Size()
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return nil
	}
	// Whatever kept it from sharing (EXDEV, EOPNOTSUPP, EINVAL, …) does not keep it
	// from copying.
	if err := dst.Truncate(size); err != nil {
		return fmt.Errorf("copy memory file: %w", err)
	}
	for pos := int64(0); pos < size; {
		data, err := unix.Seek(int(src.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole is left
		}
		end := size
		if err == nil {
			pos = data
			if end, err = unix.Seek(int(src.Fd()), pos, unix.SEEK_HOLE); err != nil {
				end = size
			}
		}
		if err := copyRange(ctx, src, dst, pos, end-pos); err != nil {
			return fmt.Errorf("copy memory file: %w", err)
		}
		pos = end
	}
	return nil
}

// copyRange copies n bytes at pos to the same place.
func copyRange(ctx context.Context, src, dst *os.File, pos, n int64) error {
	inKernel := true
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := min(n, copyStep)
		var done int64
		var err error
		if inKernel {
			in, out := pos, pos
			var k int
			k, err = unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(step), 0)
			done = int64(k)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) || err == nil && k == 0:
				// Not between these file systems, or a file that only read(2) reads.
				inKernel = false
				continue
			}
		} else {
			done, err = io.Copy(io.NewOffsetWriter(dst, pos), io.NewSectionReader(src, pos, step))
			if err == nil && done < step {
				err = io.ErrUnexpectedEOF
			}
		}
		if err != nil {
			return err
		}
		pos, n = pos+done, n-done
	}
	return nil
}
