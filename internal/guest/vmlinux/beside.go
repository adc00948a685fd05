package vmlinux

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Name is what the ELF kernel of an image is called that is called image.
func Name(image string) string {
	return "vmlinux-" + strings.TrimPrefix(image, "vmlinuz-")
}

// Beside returns the ELF kernel of the image at path, which it unpacks beside it
// the first time: that takes Debian's kernel 0.2 s. It may be called concurrently,
// also by several processes.
func Beside(path string) (string, error) {
	dir, base := filepath.Split(path)
	elf := filepath.Join(dir, Name(base))
	// It was renamed when it was whole, and its name goes with the image's content.
	if _, err := os.Stat(elf); err == nil {
		return elf, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("look for unpacked kernel: %w", err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read kernel: %w: run `fcvm setup`", err)
	}
	kernel, err := Extract(image)
	if err != nil {
		return "", err
	}
	if len(kernel) == len(image) {
		return path, nil // it is one itself
	}
	if err := write(elf, kernel); err != nil {
		return "", fmt.Errorf("store unpacked kernel: %w", err)
	}
	return elf, nil
}

// write makes a file that is there whole or not at all.
func write(path string, b []byte) error {
	// `fcvm setup` sweeps what begins with vmlinux- and belongs to no kernel.
	f, err := os.CreateTemp(filepath.Dir(path), "vmlinux-tmp-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
