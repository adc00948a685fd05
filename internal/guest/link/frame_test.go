package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"fcvm/internal/guest/proto"
)

func TestParserFindsFrames(t *testing.T) {
	a := appendFrame(nil, kindData, []byte("first"))
	b := appendFrame(nil, kindData, bytes.Repeat([]byte("x"), maxPayload))
	torn := b[:len(b)/2]
	corrupt := bytes.Clone(a)
	corrupt[len(corrupt)-1] ^= 1
	for name, c := range map[string]struct {
		in      []byte
		frames  int
		garbage int
	}{
		"two":             {cat(a, b), 2, 0},
		"padding":         {cat(make([]byte, 40_000), a, make([]byte, 5), b), 2, 0},
		"garbage between": {cat(a, []byte("noise"), b), 2, 1},
		// The torn frame's length reaches into the second of those after it.
		"torn":    {cat(torn, a, b, b), 3, 1},
		"corrupt": {cat(corrupt, a), 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []io.Reader{bytes.NewReader(c.in), iotest.OneByteReader(bytes.NewReader(c.in))} {
				p := newParser(r)
				frames, garbage := 0, 0
				for {
					_, err := p.next()
					if errors.Is(err, errGarbage) {
						garbage++
						continue
					}
					if err != nil {
						break
					}
					frames++
				}
				if frames != c.frames || garbage != c.garbage {
					t.Errorf("found %d frames and garbage %d times, want %d and %d", frames, garbage, c.frames, c.garbage)
				}
			}
		})
	}
}

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestOtherVersion(t *testing.T) {
	ours, theirs := net.Pipe()
	go func() {
		p := newParser(ours)
		f, err := p.next()
		if err != nil {
			return
		}
		answer := bytes.Clone(f.payload)
		answer[0] = proto.Version + 1
		go func() { _, _ = io.Copy(io.Discard, ours) }()
		_, _ = ours.Write(appendFrame(nil, kindAck, answer))
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := Dial(ctx, theirs)
	if err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("Dial = %v, want an error about the version", err)
	}
	ours.Close()
}

func FuzzParser(f *testing.F) {
	a := appendFrame(nil, kindData, []byte("first"))
	f.Add(a)
	f.Add(cat([]byte("\x00\x00"), a, a[:7], a))
	f.Add(cat(a[:10], a))
	f.Fuzz(func(t *testing.T, in []byte) {
		p := newParser(bytes.NewReader(in))
		total := 0
		for {
			fr, err := p.next()
			if errors.Is(err, errGarbage) {
				continue
			}
			if err != nil {
				break
			}
			total += headerSize + len(fr.payload)
		}
		if total > len(in) {
			t.Fatalf("frames of %d bytes out of %d", total, len(in))
		}
		// Whatever came before, a whole frame after enough padding is found.
		p = newParser(bytes.NewReader(cat(in, make([]byte, maxFrame), a)))
		found := false
		for {
			fr, err := p.next()
			if errors.Is(err, errGarbage) {
				continue
			}
			if err != nil {
				break
			}
			found = fr.kind == kindData && string(fr.payload) == "first"
		}
		if !found {
			t.Fatal("a greeting would not be heard after this")
		}
	})
}

// FuzzHost plays a hostile guest that has answered the greeting.
func FuzzHost(f *testing.F) {
	f.Add([]byte("noise"))
	f.Add(appendFrame(nil, kindData, []byte{0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0}))
	f.Add(appendFrame(nil, kindBye, nil))
	f.Add(appendFrame(nil, kindQuiesced, []byte{0, 0, 0, 1}))
	f.Add(appendFrame(nil, kindHello, nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer ours.Close()
			fr, err := newParser(ours).next()
			if err != nil {
				return
			}
			drained := make(chan struct{})
			go func() {
				defer close(drained)
				_, _ = io.Copy(io.Discard, ours)
			}()
			_, _ = ours.Write(appendFrame(nil, kindAck, fr.payload))
			_, _ = ours.Write(in)
			ours.Close()
			<-drained
		}()
		h, err := Dial(context.Background(), theirs)
		if err == nil {
			<-h.Done() // at the latest with the connection's end
			h.Close()
		}
		<-done
	})
}
