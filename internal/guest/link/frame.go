// Package link makes one session after the other out of one byte stream that
// never starts anew: a virtio-serial port, whose guest end lives through
// snapshots, clones and restarts of the supervisor.
//
// The stream carries frames with a magic and a checksum. The host opens a
// session with HELLO and a nonce; once the guest answers with that nonce, all that
// came before belongs to nobody and is dropped. DATA frames carry a yamux session,
// in which only the host opens streams. QUIESCE and QUIESCED stop both directions
// at a frame's end, so that a snapshot catches no half frame; RESUME, or the HELLO of
// another host in a clone, ends that. IDENTIFY and IDENTIFIED give a clone its
// identity before any session begins: the shortest way there is, because under TCG
// every function of the guest that runs for the first time costs its translation,
// and a session is some thousand. BYE tells that the guest ends; the host's
// BYE back tells that it has read everything.
package link

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

type kind uint8

const (
	kindHello    kind = 1 // host → guest: version, nonce
	kindAck      kind = 2 // guest → host: the same
	kindData     kind = 3 // both ways: bytes of the yamux session
	kindQuiesce  kind = 4 // host → guest: sequence number
	kindQuiesced kind = 5 // guest → host: the same
	kindResume   kind = 6 // host → guest
	kindBye      kind = 7 // guest → host: the last frame; host → guest: seen

	kindIdentify   kind = 8 // host → guest: nonce, identity
	kindIdentified kind = 9 // guest → host: the nonce, then what went wrong, or nothing
)

const (
	// A frame is: magic, kind, a zero byte, uint16 length, CRC-32C of kind to
	// length and of the payload; big-endian. Zero bytes between frames are padding.
	headerSize = 12
	// A whole frame goes into one write to a virtio-serial port, which takes at
	// most 32 KiB (drivers/char/virtio_console.c, port_fops_write): the guest's
	// frames are never torn.
	maxFrame   = 32 << 10
	maxPayload = maxFrame - headerSize
	nonceSize  = 16
	helloSize  = 1 + nonceSize
)

var frameMagic = [4]byte{0xfc, 'L', 'N', 'K'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errGarbage tells that bytes were skipped before the frame that comes next.
var errGarbage = errors.New("garbage in the stream")

type frame struct {
	kind    kind
	payload []byte
}

func appendFrame(b []byte, k kind, payload []byte) []byte {
	b = append(b, frameMagic[:]...)
	b = append(b, byte(k), 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	b = binary.BigEndian.AppendUint32(b, checksum(b[len(b)-4:], payload))
	return append(b, payload...)
}

func checksum(head, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(head, castagnoli), castagnoli, payload)
}

// parser finds frames in a stream. It holds one frame's memory, whatever comes.
type parser struct {
	r *bufio.Reader
}

func newParser(r io.Reader) *parser {
	return &parser{r: bufio.NewReaderSize(r, maxFrame)}
}

// next returns the next frame, whose payload is valid until the next call. The
// error is errGarbage, once, when other bytes than padding were skipped; the frame
// after them comes with the next call. A frame that was cut off is skipped too, even
// where the next one lies in what its length claims.
func (p *parser) next() (frame, error) {
	garbage := false
	for {
		// Padding and garbage are skipped before a whole header is waited for: a
		// greeting is answered when its last byte is there.
		b, err := p.r.Peek(1)
		if err != nil {
			return frame{}, err
		}
		if b[0] == 0 {
			p.skipZeros()
			continue
		}
		n, bad, err := p.match()
		if err != nil {
			return frame{}, err
		}
		if bad {
			garbage = true
			p.discard(n)
			continue
		}
		if garbage {
			return frame{}, errGarbage // the frame stays in the buffer
		}
		all, err := p.r.Peek(n)
		if err != nil {
			return frame{}, err
		}
		f := frame{kind: kind(all[4]), payload: all[headerSize:]}
		p.discard(n)
		return f, nil
	}
}

// match looks at what lies at the front: a whole frame of n bytes, or bad bytes
// of which n can be skipped.
func (p *parser) match() (n int, bad bool, err error) {
	for i := range frameMagic {
		b, err := p.r.Peek(i + 1)
		if err != nil {
			return 0, false, err
		}
		if b[i] != frameMagic[i] {
			return max(i, 1), true, nil
		}
	}
	head, err := p.r.Peek(headerSize)
	if err != nil {
		return 0, false, err
	}
	size := int(binary.BigEndian.Uint16(head[6:]))
	k := kind(head[4])
	if k < kindHello || k > kindIdentified || head[5] != 0 || size > maxPayload {
		return 1, true, nil
	}
	all, err := p.r.Peek(headerSize + size)
	if err != nil {
		return 0, false, err
	}
	if checksum(all[4:8], all[headerSize:]) != binary.BigEndian.Uint32(all[8:]) {
		return 1, true, nil
	}
	return headerSize + size, false, nil
}

func (p *parser) skipZeros() {
	b, _ := p.r.Peek(p.r.Buffered()) // what is buffered can be peeked
	n := 0
	for n < len(b) && b[n] == 0 {
		n++
	}
	p.discard(n)
}

func (p *parser) discard(n int) {
	_, _ = p.r.Discard(n) // n bytes were peeked, so they are there
}

func parseHello(b []byte) (version byte, nonce [nonceSize]byte, err error) {
	if len(b) != helloSize {
		return 0, nonce, fmt.Errorf("greeting of %d bytes", len(b))
	}
	return b[0], [nonceSize]byte(b[1:]), nil
}
