package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// byDevice names the modules of virtio's device ids (virtio specification 1.2,
// section 5).
var byDevice = map[uint64]string{
	1:  "virtio_net",
	2:  "virtio_blk",
	3:  "virtio_console",
	4:  "virtio_rng",
	5:  "virtio_balloon",
	9:  "9pnet_virtio",
	19: "vmw_vsock_virtio_transport",
}

// modules loads what package guest packed below /modules.
type modules struct {
	order  map[string][]string
	params map[string]string
	loaded map[string]bool
}

func loadModules(params map[string]string, first []string) error {
	list, err := os.ReadFile("/modules/list")
	if err != nil {
		return fmt.Errorf("read list of kernel modules: %w", err)
	}
	m := &modules{order: parseList(string(list)), params: params, loaded: map[string]bool{}}
	for _, name := range first {
		if err := m.load(name); err != nil {
			return err
		}
	}
	files, err := filepath.Glob("/sys/bus/virtio/devices/*/device")
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("read virtio device: %w", err)
		}
		id, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 16)
		if err != nil {
			return fmt.Errorf("read virtio device %s: %w", f, err)
		}
		if err := m.load(byDevice[id]); err != nil {
			return err
		}
	}
	return nil
}

// parseList reads lines "name: module module …", in the order to load.
func parseList(list string) map[string][]string {
	order := map[string][]string{}
	for line := range strings.Lines(list) {
		if name, mods, ok := strings.Cut(line, ":"); ok {
			order[name] = strings.Fields(mods)
		}
	}
	return order
}

// load loads a module and what it needs; one that was not packed is built in.
func (m *modules) load(name string) error {
	for _, mod := range m.order[name] {
		if m.loaded[mod] {
			continue
		}
		m.loaded[mod] = true
		f, err := os.Open("/modules/" + mod + ".ko")
		if err != nil {
			return fmt.Errorf("load kernel module: %w", err)
		}
		err = unix.FinitModule(int(f.Fd()), moduleParams(m.params, mod), 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load kernel module %s: %w", mod, err)
		}
	}
	return nil
}

// moduleParams collects "module.name=value" of the kernel's command line, which
// the kernel applies to built-in modules only.
func moduleParams(params map[string]string, mod string) string {
	var words []string
	for k, v := range params {
		name, param, ok := strings.Cut(k, ".")
		if ok && strings.ReplaceAll(name, "-", "_") == mod {
			words = append(words, param+"="+v)
		}
	}
	slices.Sort(words)
	return strings.Join(words, " ")
}
