// Command build writes an image that is made of Debian's packages to a
// directory, as an OCI layout:
//
//	go run ./test/images/build nginx /tmp/nginx && fcvm run oci:/tmp/nginx
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"fcvm/test/images"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintf(os.Stderr, "usage: build %s DIR\n", strings.Join(images.Names(), "|"))
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "build: error:", err)
		os.Exit(1) //nolint:gocritic // nothing is deferred that matters here
	}
}

func run(ctx context.Context, name, dir string) error {
	// Layouts only grow; one from an earlier build would keep its images.
	if old, err := os.ReadDir(dir); err == nil && len(old) > 0 {
		return fmt.Errorf("write layout: %s is not empty; remove it first", dir)
	}
	cache, err := images.CacheDir()
	if err != nil {
		return err
	}
	img, err := images.Build(ctx, name, cache)
	if err != nil {
		return err
	}
	if err := images.WriteOCI(dir, img, "latest"); err != nil {
		return err
	}
	d, err := img.Digest()
	if err != nil {
		return fmt.Errorf("compute digest: %w", err)
	}
	fmt.Println(d)
	return nil
}
