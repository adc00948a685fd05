package images_test

import (
	"context"
	"os"
	"testing"

	"fcvm/internal/image"
	"fcvm/test/images"
)

// BenchmarkNginx measures what stands before the first run of an image: making
// it, and pulling it from a registry of this process into a root file system.
func BenchmarkNginx(b *testing.B) {
	ctx := context.Background()
	cache, err := images.CacheDir()
	if err != nil {
		b.Fatal(err)
	}
	img, err := images.Build(ctx, "nginx", cache)
	if err != nil {
		b.Skipf("no packages: %v", err)
	}
	b.Run("build", func(b *testing.B) {
		for b.Loop() {
			again, err := images.Build(ctx, "nginx", cache)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := again.Digest(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("pull", func(b *testing.B) {
		r, err := images.Serve(ctx)
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = r.Close() }()
		if err := r.Push(ctx, "nginx:latest", img); err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			dir := b.TempDir()
			s, err := image.Open(dir)
			if err != nil {
				b.Fatal(err)
			}
			got, err := s.Pull(ctx, r.Addr()+"/nginx:latest", image.PullOptions{})
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(got.Size)
			_ = os.RemoveAll(dir) // the disk need not hold all of them
		}
	})
}
