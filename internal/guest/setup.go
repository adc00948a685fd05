package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"fcvm/internal/flock"
	"fcvm/internal/guest/vmlinux"
)

// SetupOptions say where the guest's parts come from. With none of KernelDeb and
// Kernel, an earlier setup's kernel is kept if there is one; else the kernel is
// downloaded, with apt where that knows a package, else from Mirror.
type SetupOptions struct {
	// Dir is where the result goes, see datadir.Layout.Guest. It is made.
	Dir string
	// KernelDeb is a Debian kernel package with its modules inside.
	KernelDeb string
	// Kernel is a bzImage or a vmlinux; Modules a directory with its modules, such
	// as /lib/modules/VERSION, or empty when all is built in.
	Kernel, Modules string
	// InitBinary is fcvm-init; empty means the one beside the running program.
	InitBinary string
	// Mirror is a Debian mirror's URL, Suite a release's name; empty means
	// [DefaultMirror] and [DefaultSuite]. A Mirror that is set is used even where
	// apt is there.
	Mirror, Suite string
	// Package is the Debian package that names the kernel to download; empty means
	// one for VMs, as small as Debian or Ubuntu have.
	Package string
	// Extra are modules that InitBinary loads beside those that a VM needs; each must
	// be there.
	Extra []string
	// Refresh downloads the kernel even if there is one.
	Refresh bool
	// Progress is told what is done; total is 0 when it is not known. It is called
	// from one goroutine at a time.
	Progress func(stage string, done, total int64)
}

// Setup makes the kernel and the initramfs in o.Dir, as far as they are not
// there yet, and returns them. It changes all or nothing. Of setups of one
// directory at the same time, one works and the others wait for it.
func Setup(ctx context.Context, o SetupOptions) (*Assets, error) {
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	if o.KernelDeb != "" && o.Kernel != "" {
		return nil, errors.New("set up guest: choose one of a kernel package and a kernel file")
	}
	a, err := setup(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("set up guest: %w", err)
	}
	return a, nil
}

func setup(ctx context.Context, o SetupOptions) (*Assets, error) {
	init, err := readInit(o.InitBinary)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := flock.Open(ctx, filepath.Join(o.Dir, "setup.lock"), unix.LOCK_EX, func() { o.Progress("wait for another setup", 0, 0) })
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	o.Progress("check", 0, 0)
	cur, err := Open(o.Dir)
	if err == nil {
		err = cur.Verify()
	}
	if err != nil {
		if !errors.Is(err, ErrNotSetUp) {
			return nil, err
		}
		cur = nil
	}
	if cur != nil && !slices.Equal(cur.Extra, o.Extra) {
		o.Refresh = true // only the modules that were asked for are kept
	}
	tmp, err := os.MkdirTemp(o.Dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)

	s, err := prepare(ctx, o, cur, tmp)
	if err != nil {
		return nil, err
	}
	next := *cur.orZero()
	if s.kernel == "" {
		if cur.InitDigest == digestBytes(init) {
			return cur, nil
		}
		s.modules = filepath.Join(o.Dir, modulesName(cur.KernelDigest))
	} else if err := next.describe(s); err != nil {
		return nil, err
	}
	next.InitDigest = digestBytes(init)
	next.Extra = o.Extra
	next.Format = format
	return build(o, cur, &next, s, init, tmp)
}

const (
	tempPrefix = ".setup-"
	// downloadPrefix is that of a download that is not complete.
	downloadPrefix = ".download-"
)

// source is a kernel that was found. An empty kernel means the present one.
type source struct {
	kernel, modules     string // files in, or outside of, the temporary directory
	version             string
	description, digest string
}

// prepare finds the kernel that o asks for.
func prepare(ctx context.Context, o SetupOptions, cur *Assets, tmp string) (source, error) {
	switch {
	case o.Kernel != "":
		return kernelFile(o, cur)
	case o.KernelDeb != "":
		digest, err := digestFile(o.KernelDeb)
		if err != nil {
			return source{}, fmt.Errorf("read kernel package: %w", err)
		}
		if cur != nil && cur.SourceDigest == digest && !o.Refresh {
			return source{}, nil
		}
		return unpackPackages(ctx, o, []string{o.KernelDeb}, filepath.Base(o.KernelDeb), digest, tmp)
	case cur != nil && !o.Refresh:
		return source{}, nil
	}
	debs, err := downloadKernel(ctx, o, tmp)
	if err != nil {
		return source{}, err
	}
	digest, err := digestFile(debs[0])
	if err != nil {
		return source{}, err
	}
	return unpackPackages(ctx, o, debs, filepath.Base(debs[0]), digest, tmp)
}

func kernelFile(o SetupOptions, cur *Assets) (source, error) {
	mods, err := readModules(o.Modules)
	if err != nil {
		return source{}, err
	}
	p, err := mods.resolve(o.Extra)
	if err != nil {
		return source{}, err
	}
	digest, err := digestFile(o.Kernel)
	if err != nil {
		return source{}, fmt.Errorf("read kernel: %w", err)
	}
	h := sha256.New()
	fmt.Fprintln(h, digest)
	for _, name := range slices.Sorted(maps.Keys(p.data)) {
		fmt.Fprintln(h, name, digestBytes(p.data[name]))
	}
	sum := digestPrefix + hex.EncodeToString(h.Sum(nil))
	if cur != nil && cur.SourceDigest == sum && !o.Refresh {
		return source{}, nil
	}
	abs, err := filepath.Abs(o.Kernel)
	if err != nil {
		return source{}, err
	}
	return source{kernel: abs, modules: o.Modules, version: "custom", description: abs, digest: sum}, nil
}

func unpackPackages(ctx context.Context, o SetupOptions, debs []string, description, digest, tmp string) (source, error) {
	s := source{
		kernel:      filepath.Join(tmp, "vmlinuz"),
		modules:     filepath.Join(tmp, "modules"),
		description: description,
		digest:      digest,
	}
	for _, deb := range debs {
		fi, err := os.Stat(deb)
		if err != nil {
			return source{}, err
		}
		version, err := unpackDeb(ctx, deb, tmp, func(done int64) { o.Progress("unpack kernel", done, fi.Size()) })
		if err != nil {
			return source{}, err
		}
		if version != "" {
			s.version = version
		}
	}
	if s.version == "" {
		return source{}, fmt.Errorf("%s holds no kernel; name a linux-image package", description)
	}
	if _, err := os.Stat(s.modules); err != nil {
		return source{}, fmt.Errorf("%s holds no kernel modules; name a linux-image package with its modules inside", description)
	}
	return s, nil
}

func (a *Assets) orZero() *Assets {
	if a == nil {
		return &Assets{}
	}
	return a
}

func (a *Assets) describe(s source) error {
	if err := checkKernel(s.kernel); err != nil {
		return err
	}
	digest, err := digestFile(s.kernel)
	if err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	a.KernelDigest = digest
	a.KernelVersion = s.version
	a.Source = s.description
	a.SourceDigest = s.digest
	return nil
}

// build writes all files and then the manifest, which makes them count.
func build(o SetupOptions, cur, next *Assets, s source, init []byte, tmp string) (*Assets, error) {
	o.Progress("build initramfs", 0, 0)
	mods, err := readModules(s.modules)
	if err != nil {
		return nil, err
	}
	p, err := mods.resolve(o.Extra)
	if err != nil {
		return nil, err
	}
	var initrd bytes.Buffer
	if err := writeInitramfs(&initrd, init, p); err != nil {
		return nil, err
	}
	next.InitrdDigest = digestBytes(initrd.Bytes())
	next.Modules = slices.Sorted(maps.Keys(p.data))

	if s.kernel != "" {
		if err := storeKernel(o.Dir, tmp, next, s, mods, p); err != nil {
			return nil, err
		}
	}
	if err := store(filepath.Join(o.Dir, initrdName(next.InitrdDigest)), tmp, &initrd); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(next, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := store(filepath.Join(o.Dir, manifestName), tmp, bytes.NewReader(append(b, '\n'))); err != nil {
		return nil, err
	}
	if err := syncDir(o.Dir); err != nil {
		return nil, err
	}
	prune(o.Dir, next, cur.orZero())
	o.Progress("done", 1, 1)
	return Open(o.Dir)
}

func storeKernel(dir, tmp string, next *Assets, s source, mods *moduleSet, p *plan) error {
	f, err := os.Open(s.kernel)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := store(filepath.Join(dir, kernelName(next.KernelDigest)), tmp, f); err != nil {
		return err
	}
	// The modules are kept, so that a new fcvm-init needs no download.
	keep := filepath.Join(tmp, "keep")
	if err := os.Mkdir(keep, 0o755); err != nil {
		return err
	}
	for name, data := range p.data {
		if err := store(filepath.Join(keep, name+".ko"), tmp, bytes.NewReader(data)); err != nil {
			return err
		}
	}
	builtin := strings.Join(slices.Sorted(maps.Keys(mods.builtin)), "\n") + "\n"
	if err := store(filepath.Join(keep, "modules.builtin"), tmp, strings.NewReader(builtin)); err != nil {
		return err
	}
	dest := filepath.Join(dir, modulesName(next.KernelDigest))
	if err := os.RemoveAll(dest); err != nil {
		return err
	}
	return os.Rename(keep, dest)
}

// store writes a file aside, syncs it, and moves it to path.
func store(path, tmp string, r io.Reader) error {
	f, err := os.CreateTemp(tmp, "part-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails when it was renamed
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// prune removes what neither the new nor the previous setup uses; a VM that is
// being started may still read the previous one's files.
func prune(dir string, keep ...*Assets) {
	used := map[string]bool{}
	for _, a := range keep {
		if a.KernelDigest != "" {
			used[kernelName(a.KernelDigest)] = true
			used[vmlinux.Name(kernelName(a.KernelDigest))] = true // made by an engine that needs it
			used[modulesName(a.KernelDigest)] = true
			used[initrdName(a.InitrdDigest)] = true
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // nothing depends on it
	}
	for _, e := range entries {
		for _, prefix := range []string{"vmlinuz-", "vmlinux-", "initramfs-", "modules-", tempPrefix, downloadPrefix} {
			if strings.HasPrefix(e.Name(), prefix) && !used[e.Name()] {
				os.RemoveAll(filepath.Join(dir, e.Name()))
			}
		}
	}
}

func readInit(path string) ([]byte, error) {
	if path == "" {
		exe, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find fcvm-init: %w", err)
		}
		path = filepath.Join(filepath.Dir(exe), "fcvm-init")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read fcvm-init, which is installed beside fcvm: %w", err)
	}
	program, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("read fcvm-init: %s is no ELF program: %w", path, err)
	}
	// There is no libc in the initramfs.
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("read fcvm-init: %s is linked dynamically; build it with `CGO_ENABLED=0 go install ./cmd/...`", path)
		}
	}
	return b, nil
}

// checkKernel tells a kernel from anything else, so that a wrong file is found
// now and not in a guest that never boots.
func checkKernel(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	defer f.Close()
	head := make([]byte, 0x206)
	if _, err := io.ReadFull(f, head); err == nil {
		// Documentation/arch/x86/boot.rst: "HdrS" at 0x202.
		if string(head[0x202:]) == "HdrS" || string(head[:4]) == "\x7fELF" {
			return nil
		}
	}
	return fmt.Errorf("read kernel: %s is neither a bzImage nor a vmlinux", path)
}

func digestBytes(b []byte) string {
	sum := sha256.Sum256(b)
	return digestPrefix + hex.EncodeToString(sum[:])
}
