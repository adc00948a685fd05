package guest

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
)

// Paths in the initramfs, which fcvm-init knows too (package guestd/boot).
const (
	initPath    = "init"
	modulesDir  = "modules"
	modulesList = "modules/list"
)

// writeInitramfs writes a gzip'd cpio archive of fcvm-init and the modules. The
// same input gives the same bytes.
func writeInitramfs(w io.Writer, init []byte, p *plan) error {
	// The best compression is for the guest: under TCG it costs more to read a
	// byte than to unpack it.
	gz, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	c := &cpioWriter{w: gz}
	for _, dir := range []string{"dev", "proc", "sys", "run", "root", modulesDir} {
		c.dir(dir)
	}
	// The kernel opens /dev/console for PID 1 before anything is mounted
	// (init/main.c, console_on_rootfs).
	c.device("dev/console", 5, 1)
	c.file(initPath, 0o755, init)
	var list strings.Builder
	for _, name := range slices.Sorted(maps.Keys(p.order)) {
		fmt.Fprintf(&list, "%s: %s\n", name, strings.Join(p.order[name], " "))
	}
	c.file(modulesList, 0o644, []byte(list.String()))
	for _, name := range slices.Sorted(maps.Keys(p.data)) {
		c.file(modulesDir+"/"+name+".ko", 0o644, p.data[name])
	}
	if err := c.close(); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	if err := gz.Close(); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

// cpioWriter writes the "newc" format that the kernel unpacks
// (Documentation/driver-api/early-userspace/buffer-format.rst). The first error
// sticks.
type cpioWriter struct {
	w   io.Writer
	n   int64
	ino uint32
	err error
}

const (
	cpioDir  = 0o040000
	cpioFile = 0o100000
	cpioChar = 0o020000
)

func (c *cpioWriter) dir(name string) { c.entry(name, cpioDir|0o755, 0, 0, nil) }

func (c *cpioWriter) file(name string, perm uint32, data []byte) {
	c.entry(name, cpioFile|perm, 0, 0, data)
}

func (c *cpioWriter) device(name string, major, minor uint32) {
	c.entry(name, cpioChar|0o600, major, minor, nil)
}

func (c *cpioWriter) entry(name string, mode, major, minor uint32, data []byte) {
	c.ino++
	c.header(name, c.ino, mode, major, minor, len(data))
	c.bytes(data)
	c.pad()
}

// header writes magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor,
// devminor, rdevmajor, rdevminor, namesize, check: 8 hexadecimal digits each.
func (c *cpioWriter) header(name string, ino, mode, major, minor uint32, size int) {
	c.bytes(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		ino, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0))
	c.bytes(append([]byte(name), 0))
	c.pad()
}

func (c *cpioWriter) close() error {
	c.header("TRAILER!!!", 0, 0, 0, 0, 0)
	return c.err
}

func (c *cpioWriter) bytes(b []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(b)
	c.n += int64(n)
	c.err = err
}

func (c *cpioWriter) pad() {
	if r := c.n % 4; r != 0 {
		c.bytes(make([]byte, 4-r))
	}
}
