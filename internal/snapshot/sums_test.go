package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/pagesum"
)

// pageSums reads the table as the page server does.
func pageSums(t *testing.T, s *Snapshot) *pagesum.Table {
	t.Helper()
	f, err := os.Open(s.PageSums())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := pagesum.Read(f, testMemory/pageSize)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// wantSums compares the table with the memory file, page by page.
func wantSums(t *testing.T, s *Snapshot) {
	t.Helper()
	mem, err := os.ReadFile(s.Memory())
	if err != nil {
		t.Fatal(err)
	}
	if bad := pageSums(t, s).Check(0, mem); bad != -1 {
		t.Errorf("%s: the sum of page %d is not its own", s.Name, bad)
	}
}

func TestPageSums(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1, 0, 2)
	wantSums(t, snap)
	table := pageSums(t, snap)
	if table.Sum(0) == 0 || table.Sum(1) != 0 || table.Sum(2) == 0 || table.Sum(3) != 0 {
		t.Errorf("sums are %x %x %x %x", table.Sum(0), table.Sum(1), table.Sum(2), table.Sum(3))
	}
}

// TestPageSumsOfAClone has pages of the parent, of the clone alone, and one that
// the clone made a hole.
func TestPageSumsOfAClone(t *testing.T) {
	s := open(t)
	parent := create(t, s, "parent", 1, 2, 3)
	child, err := s.Create(t.Context(), "child", func(ctx context.Context, d *Draft) (Manifest, error) {
		mem, err := d.CreateMemory(ctx, testMemory, parent)
		if err != nil {
			return Manifest{}, err
		}
		if _, err := mem.WriteAt([]byte{7}, pageSize); err != nil {
			return Manifest{}, err
		}
		if err := unix.Fallocate(int(mem.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 2*pageSize, pageSize); err != nil {
			return Manifest{}, err
		}
		return testManifest(), os.WriteFile(d.StatePath(), []byte("x"), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	wantSums(t, child)
	was, is := pageSums(t, parent), pageSums(t, child)
	if is.Sum(0) != was.Sum(0) || is.Sum(1) == was.Sum(1) || is.Sum(2) != 0 {
		t.Error("the clone's sums are not those of its pages")
	}
}

func TestVerifyNamesThePage(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(t *testing.T, path string)
		word string
	}{
		"edited": {func(t *testing.T, path string) { write(t, path, 2*pageSize+9, "x") }, "at page 2 (offset 0x2000)"},
		"filled": {func(t *testing.T, path string) { write(t, path, 500*pageSize, "x") }, "at page 500 (offset 0x1f4000)"},
		"lost": {func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, pageSize); err != nil {
				t.Fatal(err)
			}
		}, "at page 0 (offset 0x0)"},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			snap := create(t, s, "base", 1, 2, 3)
			c.harm(t, snap.Memory())
			wantErr(t, s.Verify(t.Context(), "base", nil), ErrDamaged, "the content of mem.img changed", c.word)
		})
	}
}

// TestVerifyReadsPageSums harms the table where nobody would look who compared
// the memory with its own SHA-256 alone.
func TestVerifyReadsPageSums(t *testing.T) {
	s := open(t)
	snap := create(t, s, "base", 1, 2, 3)
	write(t, snap.PageSums(), 16, "\x00\x00\x00\x00")
	wantErr(t, s.Verify(t.Context(), "base", nil), ErrDamaged, "the content of mem.sums changed")
}

// BenchmarkSumMemory shows what the page sums add to the pass over the memory
// file that a snapshot makes anyway, after its pause.
func BenchmarkSumMemory(b *testing.B) {
	const size = 64 << 20
	f, err := os.Create(b.TempDir() + "/" + memoryFile)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, size)
	for i := range buf {
		buf[i] = byte(i >> 3)
	}
	if _, err := f.Write(buf); err != nil {
		b.Fatal(err)
	}
	b.Run("sha256", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			h := sha256.New()
			var number [8]byte
			var zeros [pageSize]byte
			err := dataPages(b.Context(), f, size, nil, func(_ int64, data []byte) {
				if !bytes.Equal(data, zeros[:]) {
					h.Write(number[:])
					h.Write(data)
				}
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("sha256+crc32c", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			if _, _, err := sumMemory(b.Context(), f, size, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}
