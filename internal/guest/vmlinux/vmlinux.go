// Package vmlinux takes the ELF kernel out of a bzImage. Distributions ship
// kernels as bzImages, which unpack themselves when they are booted by firmware;
// Firecracker starts the ELF kernel itself.
//
// It holds an image and its kernel in memory: some 10 and 50 MB for Debian's.
package vmlinux

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// maxKernel bounds what an image may unpack to, in bytes.
const maxKernel = 512 << 20

// ErrMalformed means that an image is not a kernel, or a damaged one.
var ErrMalformed = errors.New("malformed kernel")

// Where things are in a bzImage: Documentation/arch/x86/boot.rst of Linux.
const (
	setupSectsAt    = 0x1f1
	magicAt         = 0x202 // "HdrS"
	versionAt       = 0x206
	payloadAt       = 0x248
	payloadLengthAt = 0x24c
	headerEnd       = 0x250
	// payloadVersion is the first version of the header that tells of the payload
	// (Linux 2.6.26).
	payloadVersion = 0x0208
)

// compressions of a payload, by how it begins.
var compressions = [...]struct {
	name, magic string
	unpack      func(b []byte, size int64) ([]byte, error) // nil: not supported
}{
	{"gzip", "\x1f\x8b", unpackGzip},
	{"xz", "\xfd7zXZ\x00", unpackXZ},
	{"lz4", "\x02\x21\x4c\x18", unpackLZ4},
	{"zstd", "\x28\xb5\x2f\xfd", unpackZstd},
	{"bzip2", "BZh", nil},
	{"lzma", "\x5d\x00\x00", nil},
	{"lzo", "\x89LZO", nil},
}

// Extract returns the ELF kernel in image, or image itself if it is one. The
// error wraps [ErrMalformed] unless the kernel is in order, and compressed in a
// way that is not known here.
func Extract(image []byte) ([]byte, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return image, checkELF(image)
	}
	payload, err := payloadOf(image)
	if err != nil {
		return nil, err
	}
	for _, c := range compressions {
		if !bytes.HasPrefix(payload, []byte(c.magic)) {
			continue
		}
		if c.unpack == nil {
			return nil, fmt.Errorf("unpack kernel: it is compressed with %s; use one with gzip, xz, lz4 or zstd, or an uncompressed one", c.name)
		}
		// Its size is behind it: gzip ends with it anyhow, and to the others the
		// kernel's build appends it.
		size := int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
		if size > maxKernel {
			return nil, fmt.Errorf("unpack kernel: %w: it claims %d bytes", ErrMalformed, size)
		}
		if c.name != "gzip" {
			payload = payload[:len(payload)-4]
		}
		kernel, err := c.unpack(payload, size)
		if err != nil {
			return nil, fmt.Errorf("unpack kernel: %w: %s: %w", ErrMalformed, c.name, err)
		}
		if int64(len(kernel)) != size {
			return nil, fmt.Errorf("unpack kernel: %w: %s: it claims %d bytes and has %d", ErrMalformed, c.name, size, len(kernel))
		}
		return kernel, checkELF(kernel)
	}
	return nil, fmt.Errorf("unpack kernel: %w: no known compression begins with % x", ErrMalformed, payload[:8])
}

// payloadOf finds the compressed kernel, 16 bytes or more.
func payloadOf(image []byte) ([]byte, error) {
	if len(image) < headerEnd || string(image[magicAt:magicAt+4]) != "HdrS" {
		return nil, fmt.Errorf("read kernel: %w: neither a bzImage nor ELF", ErrMalformed)
	}
	if v := binary.LittleEndian.Uint16(image[versionAt:]); v < payloadVersion {
		return nil, fmt.Errorf("read kernel: %w: its boot protocol %d.%d is older than 2.8", ErrMalformed, v>>8, v&0xff)
	}
	sectors := int64(image[setupSectsAt])
	if sectors == 0 {
		sectors = 4 // so boot.rst
	}
	from := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(image[payloadAt:]))
	length := int64(binary.LittleEndian.Uint32(image[payloadLengthAt:]))
	if length < 16 || from+length > int64(len(image)) {
		return nil, fmt.Errorf("read kernel: %w: its payload of %d bytes at %d is not within its %d bytes", ErrMalformed, length, from, len(image))
	}
	return image[from : from+length], nil
}

func checkELF(kernel []byte) error {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return fmt.Errorf("read kernel: %w: %w", ErrMalformed, err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("read kernel: it is for %s %s, not x86-64", f.Class, f.Machine)
	}
	return nil
}

// readAll reads what should be size bytes, and at most one more.
func readAll(r io.Reader, size int64) ([]byte, error) {
	var b bytes.Buffer
	_, err := io.Copy(&b, io.LimitReader(r, size+1))
	return b.Bytes(), err
}

func unpackGzip(b []byte, size int64) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	r.Multistream(false)
	return readAll(r, size)
}

func unpackZstd(b []byte, size int64) ([]byte, error) {
	// zstd -22, which the kernel's build uses, has windows of up to 128 MiB.
	r, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readAll(r, size)
}

// unpackLZ4 reads the legacy format: a magic number, then blocks of up to 8 MiB,
// each behind its compressed size.
func unpackLZ4(b []byte, size int64) ([]byte, error) {
	const maxBlock = 8 << 20
	b = b[4:]
	var kernel []byte
	block := make([]byte, maxBlock)
	for len(b) > 0 && int64(len(kernel)) <= size {
		if len(b) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		n := int64(binary.LittleEndian.Uint32(b))
		if b = b[4:]; n > int64(len(b)) {
			return nil, io.ErrUnexpectedEOF
		}
		got, err := lz4.UncompressBlock(b[:n], block)
		if err != nil {
			return nil, err
		}
		kernel = append(kernel, block[:got]...)
		b = b[n:]
	}
	return kernel, nil
}
