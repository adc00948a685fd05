package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// cache holds downloaded packages. Processes that download at once wait for
// each other.
type cache struct{ dir string }

// deb returns the path of a package. Of names that are separated by "|" the
// first that exists is taken: Debian renames libraries between releases.
func (c *cache) deb(ctx context.Context, names string) (string, error) {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return "", fmt.Errorf("make package cache: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(c.dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", fmt.Errorf("lock package cache: %w", err)
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock package cache: %w", err)
	}
	alternatives := strings.Split(names, "|")
	for _, n := range alternatives {
		if path := c.find(n); path != "" {
			return path, nil
		}
	}
	var errs []error
	for _, n := range alternatives {
		path, err := c.download(ctx, n)
		if err == nil {
			return path, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

func (c *cache) find(name string) string {
	found, _ := filepath.Glob(filepath.Join(c.dir, name+"_*.deb")) // the pattern is well-formed
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1]
}

// download gets a package aside and renames it, so that a broken download is
// never found.
func (c *cache) download(ctx context.Context, name string) (string, error) {
	dir, err := os.MkdirTemp(c.dir, ".new-")
	if err != nil {
		return "", fmt.Errorf("download package: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := aptDownload(ctx, dir, name); err != nil {
		// Package lists may be missing or too old; only root can renew them.
		if os.Geteuid() != 0 {
			return "", fmt.Errorf("%w; as root, run: apt-get update", err)
		}
		if out, uerr := exec.CommandContext(ctx, "apt-get", "-q", "update").CombinedOutput(); uerr != nil {
			return "", fmt.Errorf("%w; apt-get update: %w: %s", err, uerr, tail(out))
		}
		if err := aptDownload(ctx, dir, name); err != nil {
			return "", err
		}
	}
	found, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(found) != 1 {
		return "", fmt.Errorf("download package %s: apt-get left %d packages", name, len(found))
	}
	path := filepath.Join(c.dir, filepath.Base(found[0]))
	if err := os.Rename(found[0], path); err != nil {
		return "", fmt.Errorf("download package %s: %w", name, err)
	}
	return path, nil
}

func aptDownload(ctx context.Context, dir, name string) error {
	cmd := exec.CommandContext(ctx, "apt-get", "-q", "-o", "APT::Sandbox::User=", "download", name)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("download package %s: apt-get: %w: %s", name, err, tail(out))
	}
	return nil
}

// tail is the end of a program's output.
func tail(out []byte) string {
	out = bytes.TrimSpace(out)
	if len(out) > 400 {
		out = out[len(out)-400:]
	}
	return string(out)
}

// unpack adds the files of packages to a layer. dpkg-deb gives the archive as it
// is in the package, owners and all, so root isn't needed.
func (c *cache) unpack(ctx context.Context, l *tarLayer, packages ...string) error {
	for _, p := range packages {
		path, err := c.deb(ctx, p)
		if err != nil {
			return err
		}
		var stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", path)
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("unpack %s: dpkg-deb: %w: %s", filepath.Base(path), err, tail(stderr.Bytes()))
		}
		if err := l.copyTar(bytes.NewReader(out), needed); err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Base(path), err)
		}
	}
	return nil
}

// needed leaves out what nobody reads in a container.
func needed(name string) bool {
	for _, p := range []string{"doc", "man", "locale", "lintian", "bug", "initramfs-tools", "info", "apport", "vim", "ufw"} {
		if d := "usr/share/" + p; name == d || strings.HasPrefix(name, d+"/") {
			return false
		}
	}
	for _, p := range []string{"etc/init.d", "etc/logrotate.d", "etc/ufw", "lib/systemd", "usr/lib/systemd", "usr/share/initramfs-tools"} {
		if name == p || strings.HasPrefix(name, p+"/") {
			return false
		}
	}
	return true
}
