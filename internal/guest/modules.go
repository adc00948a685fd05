package guest

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// wanted are the modules that fcvm-init may load; it decides by the devices
// that it finds. Those without which nothing boots are required, unless the
// kernel has them built in.
var wanted = []module{
	{"virtio_mmio", true},
	{"virtio_console", true},
	{"virtio_blk", true},
	{"erofs", true},
	{"overlay", true},
	{"virtio_net", false},
	{"virtio_rng", false},
	{"virtio_balloon", false},
	{"vmw_vsock_virtio_transport", false},
}

type module struct {
	name     string
	required bool
}

// maxModule bounds what one decompressed module may occupy, in bytes.
const maxModule = 64 << 20

// moduleSet finds kernel modules in a directory as packages lay it out.
type moduleSet struct {
	files   map[string]string // module name → file
	builtin map[string]bool
}

// moduleName is how the kernel itself spells a module: "virtio-rng.ko.xz" is
// virtio_rng.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModules looks for modules below dir. An empty dir is a kernel that has
// everything built in.
func readModules(dir string) (*moduleSet, error) {
	m := &moduleSet{files: map[string]string{}, builtin: map[string]bool{}}
	if dir == "" {
		for _, w := range wanted {
			m.builtin[w.name] = true
		}
		return m, nil
	}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch base := d.Name(); {
		case base == "modules.builtin":
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(b)) {
				m.builtin[moduleName(strings.TrimSpace(line))] = true
			}
		case isModule(base):
			m.files[moduleName(base)] = p
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	return m, nil
}

func isModule(base string) bool {
	for _, suffix := range []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"} {
		if strings.HasSuffix(base, suffix) {
			return true
		}
	}
	return false
}

// plan is what goes into the initramfs.
type plan struct {
	// order lists for each wanted module the modules to load, itself last.
	order map[string][]string
	data  map[string][]byte
}

// resolve loads the wanted modules, the extra ones, and what they depend on.
// Dependencies are read from the modules themselves (.modinfo), because modules.dep is made by depmod
// only when a package is installed.
func (m *moduleSet) resolve(extra []string) (*plan, error) {
	p := &plan{order: map[string][]string{}, data: map[string][]byte{}}
	all := slices.Clone(wanted)
	for _, name := range extra {
		all = append(all, module{name, true})
	}
	for _, w := range all {
		if m.builtin[w.name] {
			continue
		}
		if _, ok := m.files[w.name]; !ok {
			if w.required {
				return nil, fmt.Errorf("kernel has neither a module %s nor built it in; choose another kernel, or name its modules with --modules", w.name)
			}
			continue
		}
		order, err := m.visit(p, w.name, nil, nil)
		if err != nil {
			return nil, err
		}
		p.order[w.name] = order
	}
	return p, nil
}

// visit appends to order what name needs, and name.
func (m *moduleSet) visit(p *plan, name string, order, stack []string) ([]string, error) {
	if slices.Contains(stack, name) {
		return nil, fmt.Errorf("resolve kernel modules: %s depends on itself", name)
	}
	if slices.Contains(order, name) || m.builtin[name] {
		return order, nil
	}
	file, ok := m.files[name]
	if !ok {
		return nil, fmt.Errorf("resolve kernel modules: %s is missing, which %s needs", name, stack[len(stack)-1])
	}
	if p.data[name] == nil {
		data, err := readModule(file)
		if err != nil {
			return nil, err
		}
		p.data[name] = data
	}
	info, err := modinfo(p.data[name])
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	for _, dep := range info.depends {
		if order, err = m.visit(p, dep, order, append(stack, name)); err != nil {
			return nil, err
		}
	}
	for _, dep := range info.softPre {
		if _, ok := m.files[dep]; !ok {
			continue
		}
		if order, err = m.visit(p, dep, order, append(stack, name)); err != nil {
			return nil, err
		}
	}
	return append(order, name), nil
}

func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read kernel module: %w", err)
	}
	defer f.Close()
	r, err := decompress(file, f)
	if err != nil {
		return nil, fmt.Errorf("read kernel module: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("read kernel module %s: %w", file, err)
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("read kernel module %s: it is over %d bytes", file, maxModule)
	}
	return data, nil
}

// decompress returns r decompressed as the end of name says.
func decompress(name string, r io.Reader) (io.Reader, error) {
	switch path.Ext(name) {
	case ".xz":
		x, err := xz.NewReader(bufio.NewReaderSize(r, 1<<20)) // it reads byte by byte
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		return x, nil
	case ".zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		return z.IOReadCloser(), nil
	case ".gz":
		g, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		return g, nil
	}
	return r, nil
}

type moduleInfo struct {
	depends []string
	softPre []string
}

// modinfo reads the .modinfo section of a module: NUL-terminated key=value
// (include/linux/moduleparam.h, __MODULE_INFO).
func modinfo(data []byte) (info moduleInfo, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return info, fmt.Errorf("parse module: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil || s.Size > uint64(len(data)) {
		return info, errors.New("parse module: it has no .modinfo")
	}
	b, err := s.Data()
	if err != nil {
		return info, fmt.Errorf("parse module: %w", err)
	}
	for _, kv := range strings.Split(string(b), "\x00") {
		key, value, _ := strings.Cut(kv, "=")
		switch key {
		case "depends":
			for _, d := range strings.Split(value, ",") {
				if d != "" {
					info.depends = append(info.depends, strings.ReplaceAll(d, "-", "_"))
				}
			}
		case "softdep":
			pre := false
			for _, word := range strings.Fields(value) {
				if strings.HasSuffix(word, ":") {
					pre = word == "pre:"
				} else if pre {
					info.softPre = append(info.softPre, strings.ReplaceAll(word, "-", "_"))
				}
			}
		}
	}
	return info, nil
}
