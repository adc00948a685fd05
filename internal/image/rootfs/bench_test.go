package rootfs_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"fcvm/internal/image/rootfs"
)

// BenchmarkApply merges an uncompressed layer and writes the file system.
func BenchmarkApply(b *testing.B) {
	for _, c := range []struct{ files, size int }{{20000, 500}, {2000, 20 << 10}, {16, 4 << 20}} {
		b.Run(fmt.Sprintf("%dx%d", c.files, c.size), func(b *testing.B) {
			data := make([]byte, c.size)
			_, _ = rand.NewChaCha8([32]byte{}).Read(data) // never fails
			var l entries
			for n := range c.files {
				l = append(l, file(fmt.Sprintf("d%d/e%d/f%d", n%10, n%100, n), string(data)))
			}
			layer := archive(b, l...)
			b.SetBytes(int64(len(layer)))
			b.ReportAllocs()
			for b.Loop() {
				tmp := b.TempDir()
				w := rootfs.New(open(b, tmp, "image"), open(b, tmp, "spool"), rootfs.Limits{})
				if err := w.Apply(context.Background(), bytes.NewReader(layer)); err != nil {
					b.Fatal(err)
				}
				if _, err := w.Finish(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
