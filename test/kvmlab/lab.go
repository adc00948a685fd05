//go:build linux

package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"fcvm/internal/buildinfo"
	"fcvm/internal/guest/boot"
)

// labModules are what the lab loads of Debian's kernel: what makes it a host for
// VMs. Nothing in the lab can load another.
var labModules = []string{"virtio_mmio", "9pnet_virtio", "9p", "overlay", "kvm_amd", "tun"}

// layout is what the host tells the lab about the directories that it shares, on
// the kernel's command line.
type layout struct {
	// Writable are directories of the host that the lab writes to, by 9p tag.
	Writable map[string]string
	// Guest is a directory that `fcvm setup` filled, or empty.
	Guest string
}

const layoutParam = "kvmlab.layout="

func (l layout) param() (string, error) {
	b, err := json.Marshal(l)
	if err != nil {
		return "", err
	}
	return layoutParam + base64.RawURLEncoding.EncodeToString(b), nil
}

func parseLayout(cmdline string) (l layout, err error) {
	for _, word := range strings.Fields(cmdline) {
		if v, ok := strings.CutPrefix(word, layoutParam); ok {
			b, err := base64.RawURLEncoding.DecodeString(v)
			if err == nil {
				err = json.Unmarshal(b, &l)
			}
			if err != nil {
				return l, fmt.Errorf("read %s: %w", layoutParam, err)
			}
		}
	}
	return l, nil
}

// share mounts what virtio-9p offers under a tag. The host's files are taken not to
// change meanwhile, so the lab's page cache may keep them (cache=loose): without that,
// each look at a file would ask QEMU. 512000 is the most that virtio carries in one
// request (net/9p/trans_virtio.c).
func share(tag, cache string) boot.Mount {
	return boot.Mount{Source: tag, Type: "9p", Data: "trans=virtio,version=9p2000.L,msize=512000,cache=" + cache}
}

const (
	rootTag = "root"
	tmpDir  = "/run/tmp"
	dataDir = "/var/lib/fcvm"
)

// hidden are directories whose content on the host the lab does not see.
var hidden = []string{"/run", dataDir, "/dev", "/proc", "/sys"}

// runInside is PID 1 of the lab. It does not return.
func runInside() {
	boot.Run(boot.Config{
		Version: buildinfo.Get(),
		Modules: labModules,
		Root:    share(rootTag, "loose"),
		Ready:   ready,
	})
}

// ready makes a host for fcvm out of the host's root: sockets, data and temporary
// files live in memory, never on 9p.
func ready() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	l, err := parseLayout(string(line))
	if err != nil {
		return err
	}
	for _, m := range []boot.Mount{
		{Source: "tmpfs", Target: "/run", Type: "tmpfs", Data: "mode=0755,size=90%"},
		{Source: "tmpfs", Target: dataDir, Type: "tmpfs", Data: "mode=0700,size=90%"},
	} {
		if err := m.Do(); err != nil {
			return err
		}
	}
	if err := os.Mkdir(tmpDir, 0o777); err != nil {
		return err
	}
	if err := os.Chmod(tmpDir, 0o1777); err != nil {
		return err
	}
	if l.Guest != "" {
		if err := os.Symlink(l.Guest, dataDir+"/guest"); err != nil {
			return err
		}
	}
	for tag, dir := range l.Writable {
		// What is written must be the host's at once: the lab's end is sudden.
		m := share(tag, "none")
		m.Target = dir
		if err := m.Do(); err != nil {
			return err
		}
	}
	return unix.Sethostname([]byte("kvmlab"))
}
