//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	archive "github.com/moby/go-archive"
	"github.com/spf13/cobra"

	"fcvm/internal/api"
)

const cpLong = `Copy files and directories into a VM, or out of it.

As with docker cp: a directory is copied into a directory that exists, or under
the name that does not exist yet; DIR/. copies what is in the directory; - is a
tar stream on standard input or output. The VM has to run.

What comes out of a VM keeps its modes but belongs to you; device files are left
out, and so are set-user-ID and set-group-ID bits.`

func newCp(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "cp VM:PATH LOCAL | cp LOCAL VM:PATH",
		Short: "Copy files into a VM, or out of it",
		Long:  cpLong,
		Args:  exactly(2, "path"),
		RunE:  func(cmd *cobra.Command, args []string) error { return a.cp(cmd.Context(), args[0], args[1]) },
	}
}

// splitPath tells VM:PATH from a local path. As with docker cp, a path that
// begins with / or . is always local.
func splitPath(arg string) (vm, p string) {
	if strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, ".") {
		return "", arg
	}
	vm, p, ok := strings.Cut(arg, ":")
	if !ok || vm == "" || strings.Contains(vm, "/") {
		return "", arg
	}
	return vm, p
}

func (a *app) cp(ctx context.Context, from, to string) error {
	fromVM, src := splitPath(from)
	toVM, dst := splitPath(to)
	switch {
	case fromVM == "" && toVM == "":
		return invalid("one of the two paths must be in a VM, as VM:PATH")
	case fromVM != "" && toVM != "":
		return invalid("copying between VMs is not supported: copy to a local path first")
	case src == "" || dst == "":
		return invalid("missing path after %q", strings.TrimSuffix(from, src)+strings.TrimSuffix(to, dst))
	}
	return a.withClient(ctx, func(c *api.Client) error {
		if toVM != "" {
			return a.cpIn(ctx, c, src, toVM, dst)
		}
		return a.cpOut(ctx, c, fromVM, src, dst)
	})
}

func (a *app) cpIn(ctx context.Context, c *api.Client, src, vm, dst string) error {
	if src == "-" {
		return c.CopyIn(ctx, vm, dst, a.in)
	}
	// docker's rule: a trailing / or /. means something, and Abs drops it.
	abs, err := filepath.Abs(src)
	if err != nil {
		return fmt.Errorf("find %s: %w", src, err)
	}
	info, err := archive.CopyInfoSourcePath(archive.PreserveTrailingDotOrSeparator(abs, src), false)
	if err != nil {
		return invalid("copy: %v", err)
	}
	content, err := archive.TarResource(info)
	if err != nil {
		return fmt.Errorf("read %s: %w", src, err)
	}
	// Closing makes the reading of files end early, when the VM did.
	defer content.Close()
	return c.CopyIn(ctx, vm, dst, content)
}

func (a *app) cpOut(ctx context.Context, c *api.Client, vm, src, dst string) error {
	content, err := c.CopyOut(ctx, vm, src)
	if err != nil {
		return err
	}
	defer content.Close()
	if dst == "-" {
		if _, err := io.Copy(a.ui.Out, content); err != nil {
			return fmt.Errorf("write tar stream: %w", err)
		}
		return nil
	}
	abs, err := filepath.Abs(dst)
	if err != nil {
		return fmt.Errorf("find %s: %w", dst, err)
	}
	dstInfo, err := archive.CopyInfoDestinationPath(archive.PreserveTrailingDotOrSeparator(abs, dst))
	if err != nil {
		return invalid("copy to %s: %v", dst, err)
	}
	first, safe, err := harmless(content)
	if err != nil {
		return fmt.Errorf("copy from %s: %w", vm, err)
	}
	defer safe.Close()
	srcInfo := archive.CopyInfo{Path: "/" + path.Base(path.Clean(first.Name)), Exists: true, IsDir: first.FileInfo().IsDir()}
	// Of DIR/. there is no name that could be replaced by that of the target.
	if path.Clean(first.Name) == "." && !dstInfo.Exists {
		if err := os.Mkdir(abs, 0o755); err != nil {
			return explainUntar(dst, err)
		}
		dstInfo = archive.CopyInfo{Path: abs, Exists: true, IsDir: true}
	}
	dir, renamed, err := archive.PrepareArchiveCopy(safe, srcInfo, dstInfo)
	if err != nil {
		return invalid("copy to %s: %v", dst, err)
	}
	defer renamed.Close()
	// NoLchown: the files belong to who copied them. Untar resolves every path
	// below dir itself, so that no link of the guest's leads out of it.
	if err := archive.Untar(renamed, dir, &archive.TarOptions{NoLchown: true, NoOverwriteDirNonDir: true}); err != nil {
		return explainUntar(dst, err)
	}
	return nil
}

func explainUntar(dst string, err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) && errors.Is(pathErr.Err, os.ErrPermission) {
		return &api.Error{Code: api.CodeUnavailable, Message: fmt.Sprintf("copy to %s: %v", dst, err)}
	}
	return fmt.Errorf("copy to %s: %w", dst, err)
}
