package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"fcvm/internal/guest/vmlinux"

	"github.com/blakesmith/ar"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// elfModule makes a kernel module that is nothing but its .modinfo.
func elfModule(info ...string) []byte {
	names := "\x00.modinfo\x00.shstrtab\x00"
	data := strings.Join(info, "\x00") + "\x00"
	var b bytes.Buffer
	put := func(v ...any) {
		for _, x := range v {
			_ = binary.Write(&b, binary.LittleEndian, x) // into memory
		}
	}
	const header, section = 64, 64
	dataAt := uint64(header)
	namesAt := dataAt + uint64(len(data))
	tableAt := namesAt + uint64(len(names))
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	put(uint16(1), uint16(62), uint32(1), uint64(0), uint64(0), tableAt, uint32(0),
		uint16(header), uint16(0), uint16(0), uint16(section), uint16(3), uint16(2))
	b.WriteString(data + names)
	b.Write(make([]byte, section))
	put(uint32(1), uint32(1), uint64(0), uint64(0), dataAt, uint64(len(data)), uint32(0), uint32(0), uint64(1), uint64(0))
	put(uint32(10), uint32(3), uint64(0), uint64(0), namesAt, uint64(len(names)), uint32(0), uint32(0), uint64(1), uint64(0))
	return b.Bytes()
}

func fakeKernel(seed byte) []byte {
	b := bytes.Repeat([]byte{seed}, 4096)
	copy(b[0x202:], "HdrS")
	return b
}

const release = "6.1.0-99-cloud-amd64"

// kernelFiles is what a package has: as Debian's, with the interesting cases.
func kernelFiles() map[string][]byte {
	mod := "./lib/modules/" + release + "/kernel/"
	files := map[string][]byte{
		"./boot/vmlinuz-" + release:                     fakeKernel(1),
		"./boot/config-" + release:                      []byte("CONFIG_X=y\n"),
		"./lib/modules/" + release + "/modules.builtin": []byte("kernel/drivers/virtio/virtio_ring.ko\nkernel/fs/ext4/ext4.ko\n"),
		mod + "drivers/virtio/virtio_mmio.ko":           elfModule("license=GPL", "depends=virtio,virtio_ring"),
		mod + "drivers/virtio/virtio.ko":                elfModule("depends="),
		mod + "drivers/char/virtio_console.ko":          elfModule("depends=virtio,virtio_ring"),
		mod + "drivers/char/hw_random/virtio-rng.ko":    elfModule("depends=virtio"),
		mod + "drivers/block/virtio_blk.ko":             elfModule("depends=virtio-ring,virtio"),
		mod + "fs/erofs/erofs.ko":                       elfModule("depends=libcrc32c", "softdep=pre: crc32c post: other"),
		mod + "lib/libcrc32c.ko":                        elfModule("depends="),
		mod + "crypto/crc32c.ko":                        elfModule("depends="),
		mod + "drivers/useless.ko":                      elfModule("depends="),
		mod + "fs/overlayfs/overlay.ko":                 elfModule("depends="),
		"./usr/share/doc/linux-image/copyright":         []byte("GPL"),
	}
	return files
}

// deb makes a package with the files, compressed as suffix says.
func deb(t testing.TB, suffix string, files map[string][]byte) []byte {
	t.Helper()
	var data bytes.Buffer
	var z io.WriteCloser = nopCloser{&data}
	var err error
	switch suffix {
	case ".xz":
		z, err = xz.NewWriter(&data)
	case ".zst":
		z, err = zstd.NewWriter(&data)
	case ".gz":
		z = gzip.NewWriter(&data)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	a := ar.NewWriter(&b)
	if err := a.WriteGlobalHeader(); err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		name string
		data []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar" + suffix, []byte("x")}, {"data.tar" + suffix, data.Bytes()}} {
		if err := a.WriteHeader(&ar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Write(m.data); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func write(t testing.TB, path string, content []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func initBinary(t testing.TB, version string) string {
	t.Helper()
	return write(t, filepath.Join(t.TempDir(), "fcvm-init"), elfModule("init="+version))
}

// unpackCPIO reads the initramfs back.
func unpackCPIO(t testing.TB, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for at := 0; ; {
		var field [13]uint32
		head := string(b[at : at+110])
		if head[:6] != "070701" {
			t.Fatalf("no cpio header at %d: %q", at, head)
		}
		for i := range field {
			if _, err := fmt.Sscanf(head[6+8*i:14+8*i], "%X", &field[i]); err != nil {
				t.Fatal(err)
			}
		}
		name := string(b[at+110 : at+110+int(field[11])-1])
		at = (at + 110 + int(field[11]) + 3) &^ 3
		if name == "TRAILER!!!" {
			return files
		}
		files[name] = string(b[at : at+int(field[6])])
		at = (at + int(field[6]) + 3) &^ 3
	}
}

func TestSetup(t *testing.T) {
	for _, suffix := range []string{"", ".xz", ".zst", ".gz"} {
		t.Run("data.tar"+suffix, func(t *testing.T) {
			dir := t.TempDir()
			pkg := write(t, filepath.Join(t.TempDir(), "linux-image.deb"), deb(t, suffix, kernelFiles()))
			o := SetupOptions{Dir: dir, KernelDeb: pkg, InitBinary: initBinary(t, "1")}
			if _, err := Open(dir); !errors.Is(err, ErrNotSetUp) {
				t.Errorf("Open before Setup = %v, want ErrNotSetUp", err)
			}
			a, err := Setup(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if a.KernelVersion != release || a.Source != "linux-image.deb" {
				t.Errorf("got %+v", a)
			}
			if err := a.Verify(); err != nil {
				t.Error(err)
			}
			files := unpackCPIO(t, a.Initrd)
			if files["init"] != string(elfModule("init=1")) {
				t.Errorf("init = %q", files["init"])
			}
			want := "erofs: libcrc32c crc32c erofs\noverlay: overlay\nvirtio_blk: virtio virtio_blk\n" +
				"virtio_console: virtio virtio_console\nvirtio_mmio: virtio virtio_mmio\nvirtio_rng: virtio virtio_rng\n"
			if files["modules/list"] != want {
				t.Errorf("list of modules:\n%s\nwant\n%s", files["modules/list"], want)
			}
			if _, ok := files["modules/virtio_rng.ko"]; !ok {
				t.Error("virtio_rng.ko is missing")
			}
			if _, ok := files["modules/useless.ko"]; ok {
				t.Error("a module that nobody needs is there")
			}
		})
	}
}

func TestSetupIsIdempotent(t *testing.T) {
	dir := t.TempDir()
	pkg := write(t, filepath.Join(t.TempDir(), "k.deb"), deb(t, ".gz", kernelFiles()))
	o := SetupOptions{Dir: dir, KernelDeb: pkg, InitBinary: initBinary(t, "1")}
	first, err := Setup(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	stages := func(o SetupOptions) (all []string, a *Assets) {
		t.Helper()
		o.Progress = func(stage string, _, _ int64) {
			if !slices.Contains(all, stage) {
				all = append(all, stage)
			}
		}
		a, err := Setup(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		return all, a
	}
	got, a := stages(o)
	if !slices.Equal(got, []string{"check"}) || a.InitrdDigest != first.InitrdDigest {
		t.Errorf("the second setup did %v", got)
	}
	// Without a package the kernel is kept, and nothing is downloaded.
	got, _ = stages(SetupOptions{Dir: dir, InitBinary: o.InitBinary, Mirror: "http://127.0.0.1:1/"})
	if !slices.Equal(got, []string{"check"}) {
		t.Errorf("a setup without options did %v", got)
	}
	// A new fcvm-init needs no kernel either. What an engine unpacked of the kernel
	// goes with it.
	unpacked := write(t, filepath.Join(dir, vmlinux.Name(filepath.Base(a.Kernel))), []byte("kernel"))
	old := write(t, filepath.Join(dir, "vmlinux-0123456789abcdef"), []byte("an old kernel"))
	got, next := stages(SetupOptions{Dir: dir, InitBinary: initBinary(t, "2"), Mirror: "http://127.0.0.1:1/"})
	if !slices.Equal(got, []string{"check", "build initramfs", "done"}) || next.KernelDigest != first.KernelDigest {
		t.Errorf("a setup with another fcvm-init did %v", got)
	}
	if files := unpackCPIO(t, next.Initrd); files["init"] != string(elfModule("init=2")) || len(files["modules/erofs.ko"]) == 0 {
		t.Errorf("the initramfs has %q", files["init"])
	}
	if _, err := os.Stat(unpacked); err != nil {
		t.Errorf("the kernel's ELF file: %v", err)
	}
	if _, err := os.Stat(old); err == nil {
		t.Error("an old kernel's ELF file was kept")
	}
	// A file that was damaged is made anew.
	if err := os.WriteFile(next.Initrd, []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := next.Verify(); !errors.Is(err, ErrNotSetUp) {
		t.Errorf("Verify of a damaged file = %v", err)
	}
	if _, a = stages(o); a.Verify() != nil {
		t.Error("the damaged file was kept")
	}
	left, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Another init may need more of the kernel than a VM does.
func TestSetupKeepsExtraModules(t *testing.T) {
	dir := t.TempDir()
	pkg := write(t, filepath.Join(t.TempDir(), "k.deb"), deb(t, ".gz", kernelFiles()))
	o := SetupOptions{Dir: dir, KernelDeb: pkg, InitBinary: initBinary(t, "1")}
	if _, err := Setup(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	o.Extra = []string{"useless"}
	a, err := Setup(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if files := unpackCPIO(t, a.Initrd); len(files["modules/useless.ko"]) == 0 || !strings.Contains(files["modules/list"], "\nuseless: useless\n") {
		t.Errorf("list of modules:\n%s", files["modules/list"])
	}
	// They are kept with the kernel.
	o = SetupOptions{Dir: dir, InitBinary: initBinary(t, "2"), Extra: o.Extra, Mirror: "http://127.0.0.1:1/"}
	if a, err = Setup(t.Context(), o); err != nil || !slices.Contains(a.Modules, "useless") {
		t.Errorf("got %+v, %v", a, err)
	}
	o.Extra, o.KernelDeb = []string{"nosuch"}, pkg
	if _, err := Setup(t.Context(), o); err == nil || !strings.Contains(err.Error(), "nosuch") {
		t.Errorf("a module that the kernel has not: %v", err)
	}
}

func TestCopyOutlivesLaterSetups(t *testing.T) {
	dir, own := t.TempDir(), filepath.Join(t.TempDir(), "own")
	pkg := write(t, filepath.Join(t.TempDir(), "k.deb"), deb(t, ".gz", kernelFiles()))
	a, err := Setup(t.Context(), SetupOptions{Dir: dir, KernelDeb: pkg, InitBinary: initBinary(t, "1")})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.CopyTo(own); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	got, err := Open(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := got.Verify(); err != nil || got.InitDigest != a.InitDigest {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestSetupFromFiles(t *testing.T) {
	mods := t.TempDir()
	for name, content := range kernelFiles() {
		if strings.Contains(name, "/modules/") {
			write(t, filepath.Join(mods, name), content)
		}
	}
	dir := t.TempDir()
	o := SetupOptions{Dir: dir, Kernel: write(t, filepath.Join(t.TempDir(), "bzImage"), fakeKernel(2)), Modules: mods, InitBinary: initBinary(t, "1")}
	a, err := Setup(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if a.Source != o.Kernel || len(a.Modules) == 0 {
		t.Errorf("got %+v", a)
	}
	// Without modules the kernel must have all built in.
	o.Modules = ""
	if a, err = Setup(t.Context(), o); err != nil || len(a.Modules) != 0 {
		t.Errorf("got %+v, %v", a, err)
	}
}

func TestSetupErrors(t *testing.T) {
	good := kernelFiles()
	without := func(part string) map[string][]byte {
		files := kernelFiles()
		for name := range files {
			if strings.Contains(name, part) {
				delete(files, name)
			}
		}
		return files
	}
	notKernel := kernelFiles()
	notKernel["./boot/vmlinuz-"+release] = []byte("text")
	cycle := kernelFiles()
	cycle["./lib/modules/"+release+"/kernel/lib/libcrc32c.ko"] = elfModule("depends=erofs")
	truncated := deb(t, ".xz", good)
	for name, c := range map[string]struct {
		deb  []byte
		want string
	}{
		"no package":        {[]byte("hello"), "no Debian package"},
		"empty":             {nil, "no Debian package"},
		"truncated":         {truncated[:len(truncated)/2], "unpack"},
		"no kernel":         {deb(t, ".gz", without("/boot/vmlinuz")), "holds no kernel"},
		"no modules":        {deb(t, ".gz", without("/modules/")), "holds no kernel modules"},
		"module missing":    {deb(t, ".gz", without("overlay")), "neither a module overlay"},
		"dependency":        {deb(t, ".gz", without("libcrc32c")), "libcrc32c is missing, which erofs needs"},
		"dependency circle": {deb(t, ".gz", cycle), "depends on itself"},
		"not a kernel":      {deb(t, ".gz", notKernel), "neither a bzImage nor a vmlinux"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			pkg := write(t, filepath.Join(t.TempDir(), "k.deb"), c.deb)
			_, err := Setup(t.Context(), SetupOptions{Dir: dir, KernelDeb: pkg, InitBinary: initBinary(t, "1")})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Setup = %v, want %q in it", err, c.want)
			}
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) != 1 { // the lock
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
	if _, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), KernelDeb: "/no/such.deb", InitBinary: initBinary(t, "1")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such package: %v", err)
	}
	if _, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), InitBinary: "/no/such/init"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no fcvm-init: %v", err)
	}
	text := write(t, filepath.Join(t.TempDir(), "init"), []byte("#!/bin/sh\n"))
	if _, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), InitBinary: text}); err == nil || !strings.Contains(err.Error(), "no ELF program") {
		t.Errorf("fcvm-init is a script: %v", err)
	}
	dynamic, err := exec.LookPath("bash")
	if err != nil {
		dynamic = "/bin/sh"
	}
	if _, err := Setup(t.Context(), SetupOptions{Dir: t.TempDir(), InitBinary: dynamic}); err == nil || !strings.Contains(err.Error(), "linked dynamically") {
		t.Errorf("fcvm-init is linked dynamically: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	pkg := write(t, filepath.Join(t.TempDir(), "k.deb"), deb(t, ".gz", good))
	if _, err := Setup(ctx, SetupOptions{Dir: t.TempDir(), KernelDeb: pkg, InitBinary: initBinary(t, "1")}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// Setups at the same time do the work once.
func TestSetupTwiceAtOnce(t *testing.T) {
	dir := t.TempDir()
	pkg := write(t, filepath.Join(t.TempDir(), "k.deb"), deb(t, ".gz", kernelFiles()))
	o := SetupOptions{Dir: dir, KernelDeb: pkg, InitBinary: initBinary(t, "1")}
	built := make(chan struct{}, 10)
	o.Progress = func(stage string, _, _ int64) {
		if stage == "build initramfs" {
			built <- struct{}{}
		}
	}
	errs := make(chan error)
	for range 3 {
		go func() {
			_, err := Setup(context.Background(), o)
			errs <- err
		}()
	}
	for range 3 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if len(built) != 1 {
		t.Errorf("%d setups built an initramfs, want 1", len(built))
	}
}

func FuzzDeb(f *testing.F) {
	f.Add(deb(f, ".gz", kernelFiles()))
	f.Add([]byte("!<arch>\ndebian-binary   0           0     0     100644  4         `\n2.0\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		_, _ = readDeb(t.Context(), bytes.NewReader(in), t.TempDir()) // must not panic
	})
}

func FuzzModinfo(f *testing.F) {
	f.Add(elfModule("depends=a,b", "softdep=pre: x post: y"))
	f.Fuzz(func(t *testing.T, in []byte) {
		_, _ = modinfo(in) // must not panic
	})
}
