// Prepare fills a directory with what the end-to-end tests need of the network and of
// the Go command, so that they can run where there is neither:
//
//	prepare -bin BIN DIR
//
// DIR then holds guest (of `fcvm setup`), oci (images, a layout each) and programs (that scripts
// copy into VMs). BIN is where fcvm is. It runs in test/e2e.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"fcvm/test/images"
)

// servers become images, on top of busybox, whose command they are.
var servers = []string{"memtest", "trap", "echo"}

func main() {
	bin := flag.String("bin", "", "`DIR` of fcvm, fcvm-init and uffd_handler")
	flag.Parse()
	if *bin == "" || flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: prepare -bin BIN DIR")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := prepare(ctx, *bin, flag.Arg(0))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare: error:", err)
		os.Exit(1)
	}
}

func prepare(ctx context.Context, bin, dir string) error {
	setup := exec.CommandContext(ctx, filepath.Join(bin, "fcvm"), "setup", "--data-dir", dir)
	if out, err := setup.CombinedOutput(); err != nil {
		return fmt.Errorf("fcvm setup: %w\n%s", err, out)
	}
	programs := filepath.Join(dir, "programs")
	for _, name := range append([]string{"clock"}, servers...) {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", programs+"/", "./testprog/"+name)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	cache, err := images.CacheDir()
	if err != nil {
		return err
	}
	layouts := filepath.Join(dir, "oci")
	nginx, err := images.Build(ctx, "nginx", cache)
	if err != nil {
		return err
	}
	busybox, err := images.Build(ctx, "busybox", cache)
	if err != nil {
		return err
	}
	err = errors.Join(
		images.WriteOCI(filepath.Join(layouts, "nginx"), nginx, "latest"),
		images.WriteOCI(filepath.Join(layouts, "busybox"), busybox, "latest"),
	)
	for _, name := range servers {
		img, e := server(busybox, filepath.Join(programs, name))
		if e == nil {
			e = images.WriteOCI(filepath.Join(layouts, name), img, "latest")
		}
		err = errors.Join(err, e)
	}
	return err
}

// server puts a program into /bin of an image.
func server(base v1.Image, program string) (v1.Image, error) {
	path := "/bin/" + filepath.Base(program)
	img, err := images.AddProgram(base, program, path)
	if err != nil {
		return nil, err
	}
	return images.WithConfig(img, func(c *v1.Config) { c.Entrypoint, c.Cmd = nil, []string{path} })
}
