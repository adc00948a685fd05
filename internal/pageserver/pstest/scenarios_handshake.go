//go:build linux

package pstest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

func faultsBeforeHandshake(l *lab) error {
	if err := l.start(256); err != nil {
		return err
	}
	for _, last := range []bool{false, true} {
		v, err := l.vmm(Config{Threads: 6})
		if err != nil {
			return err
		}
		snapshot := Expect{Snapshot: true}
		own := Expect{Snapshot: true, Clone: v.config.Clone, Version: 4}
		err = l.do(v,
			// In pieces, too: the page server may have the userfaultfd before it knows
			// what to do with it.
			[]Op{{Kind: AwaitAsleep, Others: []int{1, 2, 3, 4, 5}, Steps: []int{0, 0, 0, 1, 0}}, {Kind: Connect, Handshake: &Handshake{
				Socket: l.server.Socket, Piece: 50, Pause: 10 * time.Millisecond, DescriptorsLast: last,
			}}},
			[]Op{{Kind: Check, Pages: Pages{List: []uint32{10, 12}}, Expect: snapshot}},
			[]Op{{Kind: Write, Pages: Page(11), Version: 4}},
			[]Op{{Kind: Check, Pages: Range(200, 30), Expect: snapshot}},
			[]Op{{Kind: AwaitAsleep, Others: []int{1, 2, 3}, Steps: []int{0, 0, 0}}, {Kind: Remove, Pages: Range(100, 20)}, {Kind: Check, Pages: Range(90, 10), Expect: snapshot}, {Kind: Check, Pages: Range(100, 20), Expect: l.removed()}},
			[]Op{{Kind: Read, Pages: Page(100)}, {Kind: Read, Pages: Range(0, 90)}},
		)
		if err != nil {
			return err
		}
		if err := l.do(v, []Op{{Kind: CheckWord, Pages: Page(11), Expect: own}}); err != nil {
			return err
		}
	}
	return l.served()
}

func slowHandshake(l *lab) error {
	if err := l.start(256); err != nil {
		return err
	}
	for _, last := range []bool{false, true} {
		v, err := l.vmm(Config{Threads: 1})
		if err != nil {
			return err
		}
		connected := make(chan error, 1)
		go func() {
			connected <- v.Connect(Handshake{Socket: l.server.Socket, Piece: 1, Pause: time.Millisecond, DescriptorsLast: last})
		}()
		err = l.served()
		if err := errors.Join(<-connected, err); err != nil {
			return err
		}
		if err := l.do(v, []Op{{Kind: Check, Pages: l.all(), Expect: Expect{Snapshot: true}}}); err != nil {
			return fmt.Errorf("after a slow handshake: %w", err)
		}
	}
	return nil
}

// maxHandshake is what a page server has to take, and not more.
const maxHandshake = 64 << 10

func longHandshake(l *lab) error {
	if err := l.start(256); err != nil {
		return err
	}
	for _, more := range []int{0, 1, maxHandshake} {
		v, err := l.vmm(Config{Threads: 1})
		if err != nil {
			return err
		}
		body, err := v.handshake()
		if err != nil {
			return err
		}
		body = append(body[:len(body)-1], bytes.Repeat([]byte{' '}, maxHandshake+more-len(body))...)
		body = append(body, ']')
		h := Handshake{Socket: l.server.Socket, Body: body}
		if more > 0 {
			if err := l.refused(v, h); err != nil {
				return fmt.Errorf("a handshake of %d bytes: %w", len(body), err)
			}
			continue
		}
		if err := v.Connect(h); err != nil {
			return err
		}
		if err := l.do(v, []Op{{Kind: Check, Pages: l.all(), Expect: Expect{Snapshot: true}}}); err != nil {
			return fmt.Errorf("after a handshake of 64 KiB: %w", err)
		}
	}
	return l.served()
}

func badHandshakes(l *lab) error {
	if err := l.start(256); err != nil {
		return err
	}
	edit := func(change func([]mapping) []mapping) func([]mapping) []byte {
		return func(ms []mapping) []byte {
			body, _ := json.Marshal(change(slices.Clone(ms)))
			return body
		}
	}
	text := func(s string) func([]mapping) []byte { return func([]mapping) []byte { return []byte(s) } }
	for _, c := range []struct {
		name  string
		body  func([]mapping) []byte
		fds   []Descriptor
		close bool
	}{
		{"without a descriptor", nil, []Descriptor{None}, false},
		{"with a pipe for a userfaultfd", nil, []Descriptor{Pipe}, false},
		{"with a pipe for a pidfd", nil, []Descriptor{UFFD, Pipe}, false},
		{"with three descriptors", nil, []Descriptor{UFFD, Pidfd, Pidfd}, false},
		{"with very many descriptors", nil, slices.Repeat([]Descriptor{UFFD}, 100), false},
		{"truncated", func(ms []mapping) []byte { b, _ := json.Marshal(ms); return b[:len(b)/2] }, nil, true},
		{"not JSON", text("GET / HTTP/1.1\r\n\r\n"), nil, false},
		{"an object", text("{}"), nil, false},
		{"no regions", text("[]"), nil, false},
		{"two arrays", func(ms []mapping) []byte { b, _ := json.Marshal(ms); return append(b, b...) }, nil, true},
		{"nested deeply", text(strings.Repeat("[", 10000) + strings.Repeat("]", 10000)), nil, false},
		{"pages of 3 bytes", edit(func(ms []mapping) []mapping { ms[0].PageSize, ms[0].PageSizeKiB = 3, 3; return ms }), nil, false},
		{"an address within a page", edit(func(ms []mapping) []mapping { ms[0].Addr++; return ms }), nil, false},
		{"behind the file", edit(func(ms []mapping) []mapping { ms[0].Offset = 1 << 40; return ms }), nil, false},
		{"across the file's end", edit(func(ms []mapping) []mapping { ms[0].Offset += PageSize; return ms }), nil, false},
		{"a size that wraps around", edit(func(ms []mapping) []mapping { ms[0].Size = math.MaxUint64 - PageSize + 1; return ms }), nil, false},
		{"twice the same region", edit(func(ms []mapping) []mapping { return append(ms, ms[0]) }), nil, false},
	} {
		v, err := l.vmm(Config{Threads: 1})
		if err != nil {
			return err
		}
		h := Handshake{Socket: l.server.Socket, Descriptors: c.fds, Close: c.close}
		if c.body != nil {
			h.Body = c.body(v.mappings)
		}
		if err := l.refused(v, h); err != nil {
			return fmt.Errorf("a handshake %s: %w", c.name, err)
		}
		if err := l.served(); err != nil {
			return fmt.Errorf("a handshake %s: %w", c.name, err)
		}
	}
	return nil
}

// refused shakes hands and expects that the page server has nothing to do with it: it
// ends the connection, or the VMM, which would wait for its memory for ever.
func (l *lab) refused(v *VMM, h Handshake) error {
	err := v.Connect(h)
	if err == nil && !h.Close {
		err = v.AwaitClose()
	}
	if err != nil && !errors.Is(err, ErrEnded) {
		return err
	}
	return nil
}

func silentConnections(l *lab) error {
	if err := l.start(256); err != nil {
		return err
	}
	for n := range 8 {
		v, err := l.vmm(Config{Threads: 1})
		if err != nil {
			return err
		}
		if err := v.Connect(Handshake{Socket: l.server.Socket, Silent: true, Close: n%2 == 0}); err != nil {
			return err
		}
		if err := l.served(); err != nil {
			return err
		}
	}
	return nil
}
