package vmlinux

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// madeUp is a kernel of n bytes: an ELF header, then code that is full of calls
// and jumps, near ones and far, and of bytes that look like them. It is the same
// on every run, because testdata holds it compressed.
func madeUp(n int) []byte {
	b := make([]byte, n)
	header := elf.Header64{
		Ident:   [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:    uint16(elf.ET_EXEC),
		Machine: uint16(elf.EM_X86_64),
		Version: uint32(elf.EV_CURRENT),
		Ehsize:  64,
	}
	var buf bytes.Buffer
	_ = binary.Write(&buf, binary.LittleEndian, header) // to memory
	seed := uint32(1)
	next := func() byte {
		seed = seed*1664525 + 1013904223
		return byte(seed >> 24)
	}
	alphabet := []byte{0xe8, 0xe9, 0x00, 0xff, 0x0f, 0x80, 0x90, 0x01}
	for i := copy(b, buf.Bytes()); i < n; i++ {
		if b[i] = next(); b[i]&3 != 0 {
			b[i] = alphabet[next()&7]
		}
	}
	return b
}

// bzImage wraps a payload, with its size where size is not negative.
func bzImage(payload []byte, size int) []byte {
	if size >= 0 {
		payload = binary.LittleEndian.AppendUint32(bytes.Clone(payload), uint32(size))
	}
	const sectors, offset = 3, 0x30
	b := make([]byte, (sectors+1)*512+offset)
	b[setupSectsAt] = sectors
	copy(b[magicAt:], "HdrS")
	binary.LittleEndian.PutUint16(b[versionAt:], 0x020f)
	binary.LittleEndian.PutUint32(b[payloadAt:], offset)
	binary.LittleEndian.PutUint32(b[payloadLengthAt:], uint32(len(payload)))
	return append(append(b, payload...), "what is behind it"...)
}

// images are bzImages of kernel, by compression.
func images(t testing.TB, kernel []byte) map[string][]byte {
	t.Helper()
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	_, _ = w.Write(kernel)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zst := z.EncodeAll(kernel, nil)
	legacy := []byte{0x02, 0x21, 0x4c, 0x18}
	for part := range blocks(kernel, 16<<10) {
		dst := make([]byte, lz4.CompressBlockBound(len(part)))
		n, err := lz4.CompressBlock(part, dst, nil)
		if err != nil || n == 0 {
			t.Fatalf("compress with lz4: %d bytes, error %v", n, err)
		}
		legacy = append(binary.LittleEndian.AppendUint32(legacy, uint32(n)), dst[:n]...)
	}
	m := map[string][]byte{
		"gzip": bzImage(gz.Bytes(), -1), // ends with the size
		"zstd": bzImage(zst, len(kernel)),
		"lz4":  bzImage(legacy, len(kernel)),
	}
	for name, file := range map[string]string{"xz": "plain.xz", "xz-x86": "x86.xz"} {
		b, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		m[name] = bzImage(b, len(kernel))
	}
	return m
}

func blocks(b []byte, n int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			k := min(n, len(b))
			if !yield(b[:k]) {
				return
			}
			b = b[k:]
		}
	}
}

// testSize is that of the kernel in testdata: xz --check=crc32 [--x86] --lzma2=preset=9.
const testSize = 40 << 10

func TestExtract(t *testing.T) {
	kernel := madeUp(testSize)
	for name, image := range images(t, kernel) {
		got, err := Extract(image)
		if err != nil || !bytes.Equal(got, kernel) {
			t.Errorf("%s: %d bytes, error %v", name, len(got), err)
		}
	}
	got, err := Extract(kernel)
	if err != nil || &got[0] != &kernel[0] {
		t.Errorf("of an ELF kernel: error %v", err)
	}
}

// Nothing of an image may be missing or changed without notice.
func TestDamageIsNoticed(t *testing.T) {
	kernel := madeUp(testSize)
	for name, image := range images(t, kernel) {
		payload, err := payloadOf(image)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			what string
			do   func(p []byte) []byte
		}{
			{"cut off", func(p []byte) []byte { return append(p[:len(p)/2:len(p)/2], p[len(p)-4:]...) }},
			{"another size", func(p []byte) []byte { p[len(p)-3]++; return p }},
			{"a huge size", func(p []byte) []byte { p[len(p)-1] = 0xff; return p }},
			{"no kernel", func(p []byte) []byte { copy(p, "not compressed"); return p }},
		} {
			got, err := Extract(bzImage(c.do(bytes.Clone(payload)), -1))
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%s, %s: %d bytes, error %v", name, c.what, len(got), err)
			}
		}
		if name == "lz4" {
			continue // has no checksum
		}
		changed := bytes.Clone(payload)
		changed[len(changed)/2] ^= 0x10
		if got, err := Extract(bzImage(changed, -1)); err == nil {
			t.Errorf("%s, a bit changed: %d bytes and no error", name, len(got))
		}
	}
	for name, image := range map[string][]byte{
		"empty":     nil,
		"text":      bytes.Repeat([]byte("text "), 1000),
		"header":    bzImage(nil, -1)[:headerEnd],
		"other ELF": append([]byte("\x7fELF\x01\x01\x01"), make([]byte, 100)...),
	} {
		if _, err := Extract(image); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	old := bzImage(kernel, len(kernel))
	binary.LittleEndian.PutUint16(old[versionAt:], 0x0207)
	if _, err := Extract(old); err == nil || !strings.Contains(err.Error(), "boot protocol 2.7") {
		t.Errorf("an old image: error %v", err)
	}
}

func TestOtherCompressionsAreNamed(t *testing.T) {
	for name, magic := range map[string]string{"bzip2": "BZh9", "lzma": "\x5d\x00\x00\x80", "lzo": "\x89LZO\x00"} {
		_, err := Extract(bzImage([]byte(magic+strings.Repeat("x", 100)), 5))
		if err == nil || errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "compressed with "+name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// The filter of xz itself is the judge, on all that is likely to confuse it.
func TestX86FilterAgreesWithXZ(t *testing.T) {
	xz, err := exec.LookPath("xz")
	if err != nil {
		t.Skipf("%v: install xz-utils", err)
	}
	for _, n := range []int{64, 65, 66, 67, 68, 69, 70, 1000, 100_001} {
		kernel := madeUp(n)
		cmd := exec.Command(xz, "--check=crc32", "--x86", "--lzma2=preset=1", "--stdout")
		cmd.Stdin = bytes.NewReader(kernel)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Extract(bzImage(packed, n))
		if err != nil || !bytes.Equal(got, kernel) {
			t.Errorf("%d bytes: %d bytes, error %v", n, len(got), err)
		}
	}
	// Several blocks, and the other checks.
	kernel := madeUp(50_000)
	for _, check := range []string{"none", "crc64", "sha256"} {
		cmd := exec.Command(xz, "--check="+check, "--x86", "--lzma2=preset=1", "--block-size=16384", "--stdout")
		cmd.Stdin = bytes.NewReader(kernel)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Extract(bzImage(packed, len(kernel)))
		if err != nil || !bytes.Equal(got, kernel) {
			t.Errorf("check %s: %d bytes, error %v", check, len(got), err)
		}
	}
}

// A kernel that a distribution ships: of this host, or what the tests of guests use.
func TestRealKernel(t *testing.T) {
	found, _ := filepath.Glob("/boot/vmlinuz-*")
	if dir, err := os.UserCacheDir(); err == nil {
		more, _ := filepath.Glob(filepath.Join(dir, "fcvm-test", "guest", "vmlinuz-*"))
		found = append(found, more...)
	}
	if len(found) == 0 {
		t.Skip("no kernel in /boot, nor one that the e2e tests have set up")
	}
	image, err := os.ReadFile(found[len(found)-1])
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := Extract(image)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		t.Fatal(err)
	}
	loads := 0
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			loads++
		}
	}
	if loads == 0 {
		t.Error("the kernel has nothing to load")
	}
	t.Logf("%s: %d bytes, of which ELF of %d, entry %#x, %d segments", filepath.Base(found[len(found)-1]), len(image), len(kernel), f.Entry, loads)
}

func FuzzExtract(f *testing.F) {
	for _, image := range images(f, madeUp(testSize)) {
		f.Add(image)
	}
	small := madeUp(100)
	f.Add(small)
	f.Add(bzImage(small, 100))
	f.Fuzz(func(t *testing.T, image []byte) {
		if len(image) > 1<<20 {
			return
		}
		if kernel, err := Extract(image); err == nil && !bytes.HasPrefix(kernel, []byte(elf.ELFMAG)) {
			t.Error("what is no ELF kernel is let through")
		}
	})
}
