package vmlinux

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"slices"

	"github.com/ulikunitz/xz/lzma"
)

// The kernel's build compresses with xz --x86 --lzma2. The xz library has LZMA2
// and not the x86 filter, so the container around them is read here, as
// xz-file-format.txt 1.2.1 has it.
const (
	xzHeaderSize  = 12
	xzFilterX86   = 0x04
	xzFilterLZMA2 = 0x21
	// xzMaxDict bounds the dictionary that a file may ask for, in bytes; the
	// kernel's build uses 32 to 128 MiB.
	xzMaxDict = 256 << 20
)

var errXZ = errors.New("it is damaged")

// xzChecks are the checks that end a block, by their number.
func xzCheck(id byte) (hash.Hash, error) {
	switch id {
	case 0:
		return nil, nil
	case 1:
		return crc32.NewIEEE(), nil
	case 4:
		return crc64.New(crc64.MakeTable(crc64.ECMA)), nil
	case 10:
		return sha256.New(), nil
	}
	return nil, fmt.Errorf("check %d is unknown", id)
}

// unpackXZ reads one stream. Its index, which only tells the blocks' sizes once
// more, is not looked at.
func unpackXZ(b []byte, size int64) ([]byte, error) {
	if len(b) < xzHeaderSize || binary.LittleEndian.Uint32(b[8:]) != crc32.ChecksumIEEE(b[6:8]) || b[6] != 0 {
		return nil, errXZ
	}
	check := b[7]
	var kernel []byte
	for r := bytes.NewReader(b[xzHeaderSize:]); ; {
		more, err := unpackBlock(r, check, size+1-int64(len(kernel)))
		if err != nil || more == nil {
			return kernel, err
		}
		kernel = append(kernel, more...)
		if int64(len(kernel)) > size {
			return kernel, nil // too much; the caller tells
		}
	}
}

// unpackBlock returns the next block's content, or nil where the index begins.
func unpackBlock(r *bytes.Reader, check byte, atMost int64) ([]byte, error) {
	start := r.Len()
	first, err := r.ReadByte()
	if err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	if first == 0 {
		return nil, nil
	}
	header := make([]byte, (int(first)+1)*4)
	header[0] = first
	if _, err := io.ReadFull(r, header[1:]); err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	end := len(header) - 4
	if binary.LittleEndian.Uint32(header[end:]) != crc32.ChecksumIEEE(header[:end]) {
		return nil, errXZ
	}
	dict, x86, err := blockFilters(header[1:end])
	if err != nil {
		return nil, err
	}
	// It reads no byte more than it needs, because r is an io.ByteReader.
	l, err := lzma.Reader2Config{DictCap: dict}.NewReader2(r)
	if err != nil {
		return nil, err
	}
	content, err := readAll(l, atMost)
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > atMost {
		return content, nil
	}
	if x86 {
		decodeX86(content)
	}
	for (start-r.Len())%4 != 0 {
		if pad, err := r.ReadByte(); err != nil || pad != 0 {
			return nil, errXZ
		}
	}
	if err := verify(r, check, content); err != nil {
		return nil, err
	}
	if content == nil {
		content = []byte{}
	}
	return content, nil
}

// blockFilters reads a block's header behind its size.
func blockFilters(h []byte) (dict int, x86 bool, err error) {
	if len(h) == 0 || h[0]&0x3c != 0 {
		return 0, false, errXZ
	}
	flags, h := h[0], h[1:]
	next := func() uint64 {
		v, n := binary.Uvarint(h)
		if n <= 0 {
			err = errXZ
			return 0
		}
		h = h[n:]
		return v
	}
	for _, size := range []byte{0x40, 0x80} { // compressed, uncompressed: optional
		if flags&size != 0 {
			next()
		}
	}
	for i := range int(flags&3) + 1 {
		id, length := next(), next()
		if err != nil || length > uint64(len(h)) {
			return 0, false, errXZ
		}
		props := h[:length]
		h = h[length:]
		last := i == int(flags&3)
		switch {
		case id == xzFilterX86 && length == 0 && !last && !x86:
			x86 = true
		case id == xzFilterLZMA2 && length == 1 && last && props[0] < 40:
			// Two bits of mantissa, as in a small floating-point number.
			d := (2 | int64(props[0]&1)) << (props[0]/2 + 11)
			if d > xzMaxDict {
				return 0, false, fmt.Errorf("dictionary of %d bytes", d)
			}
			dict = int(d)
		default:
			return 0, false, fmt.Errorf("filter %#x is not supported", id)
		}
	}
	return dict, x86, nil
}

func verify(r io.Reader, check byte, content []byte) error {
	h, err := xzCheck(check)
	if h == nil {
		return err
	}
	want := make([]byte, h.Size())
	if _, err := io.ReadFull(r, want); err != nil {
		return io.ErrUnexpectedEOF
	}
	_, _ = h.Write(content)
	got := h.Sum(nil)
	if check != 10 { // sums are little-endian, SHA-256 is bytes
		slices.Reverse(got)
	}
	if !bytes.Equal(got, want) {
		return errors.New("its checksum is wrong")
	}
	return nil
}

// decodeX86 undoes the filter that turned the relative targets of CALL and JMP
// (e8, e9) into absolute ones, in place.
//
// Whether a target was converted must be told from the bytes alone: it is one
// whose highest byte is 00 or ff, unless an opcode shortly before makes it doubtful:
// then the bytes in between must not look like the highest byte of a target. recent
// has a bit for each of the three bytes before the opcode at hand which was itself
// an e8 or e9 that was not converted.
func decodeX86(b []byte) {
	sign := func(v byte) bool { return v == 0 || v == 0xff }
	// For each value of recent: how many bytes of the target are doubtful, or -1 for
	// values after which nothing is converted.
	doubtful := [8]int{0, 1, 2, -1, 3, -1, -1, -1}
	recent, last := 0, -1
	for i := 0; i+5 <= len(b); {
		if b[i]&0xfe != 0xe8 {
			i++
			continue
		}
		if gap := i - last; last < 0 || gap > 3 {
			recent = 0
		} else {
			recent = recent << (gap - 1) & 7
		}
		last = i
		n := doubtful[recent]
		if n < 0 || n > 0 && sign(b[i+4-n]) || !sign(b[i+4]) {
			recent = recent<<1&7 | 1
			i++
			continue
		}
		v := binary.LittleEndian.Uint32(b[i+1:])
		for {
			v -= uint32(i + 5)
			if n == 0 || !sign(byte(v>>(24-8*n))) {
				break
			}
			v ^= 1<<(32-8*n) - 1
		}
		// 25 bits count; the highest byte repeats the last of them.
		v &= 1<<25 - 1
		if v>>24 != 0 {
			v |= 0xff << 24
		}
		binary.LittleEndian.PutUint32(b[i+1:], v)
		i += 5
	}
}
