package proto

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	fw := NewFrameWriter(&b)
	big := bytes.Repeat([]byte("x"), MaxPayload)
	for _, err := range []error{
		fw.Write(FrameStdout, big), fw.Write(FrameStdinEOF, nil), fw.Exit(-7), fw.Fail(&Error{127, "no such"}),
		WriteFrame(&b, FrameResize, ResizePayload(24, 65535)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r := iotest.HalfReader(&b)
	buf := make([]byte, 100)
	read := func() Frame {
		t.Helper()
		f, err := ReadFrame(r, buf)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if f := read(); f.Type != FrameStdout || !bytes.Equal(f.Payload, big) {
		t.Errorf("got type %d, %d bytes", f.Type, len(f.Payload))
	}
	if f := read(); f.Type != FrameStdinEOF || len(f.Payload) != 0 {
		t.Errorf("got %+v", f)
	}
	if code, err := read().ExitCode(); code != -7 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
	var e *Error
	if err := read().Err(); !errors.As(err, &e) || e.Code != 127 || e.Message != "no such" {
		t.Errorf("error %v", err)
	}
	if rows, cols, err := read().Size(); rows != 24 || cols != 65535 || err != nil {
		t.Errorf("size %d × %d, %v", rows, cols, err)
	}
	if _, err := ReadFrame(r, buf); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if err := WriteFrame(&b, FrameStdout, make([]byte, MaxPayload+1)); err == nil {
		t.Error("a payload over the limit was written")
	}
}

func TestMalformedFrames(t *testing.T) {
	for name, in := range map[string]string{
		"type 0":      "\x00\x00\x00\x00\x00",
		"type 99":     "\x63\x00\x00\x00\x00",
		"huge length": "\x03\xff\xff\xff\xff",
		"over limit":  "\x03\x00\x01\x00\x01",
	} {
		if _, err := ReadFrame(strings.NewReader(in), nil); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
	if _, err := ReadFrame(strings.NewReader("\x03\x00\x00\x00\x05abc"), nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut off: %v, want ErrUnexpectedEOF", err)
	}
}

func TestMessages(t *testing.T) {
	var b bytes.Buffer
	in := Request{Method: MethodStart, Start: &ContainerSpec{Args: []string{"x"}, Env: []string{"A=" + strings.Repeat("v", 3*MaxPayload)}}}
	if err := WriteMessage(&b, in); err != nil {
		t.Fatal(err)
	}
	var out Request
	if err := ReadMessage(&b, &out); err != nil {
		t.Fatal(err)
	}
	if out.Method != in.Method || out.Start.Env[0] != in.Start.Env[0] {
		t.Error("the message changed")
	}
	if err := WriteMessage(&b, strings.Repeat("v", MaxMessage)); err == nil {
		t.Error("a message over the limit was written")
	}
	// An endless message must not be held.
	endless := io.MultiReader(bytes.NewReader(bytes.Repeat(appendFrame(nil, FrameMore, make([]byte, MaxPayload)), 100)))
	if err := ReadMessage(endless, &out); !errors.Is(err, ErrMalformed) {
		t.Errorf("endless message: %v, want ErrMalformed", err)
	}
	if err := ReadMessage(bytes.NewReader(appendFrame(nil, FrameMore, nil)), &out); !errors.Is(err, ErrMalformed) {
		t.Errorf("empty part: %v, want ErrMalformed", err)
	}
}

func FuzzReadMessage(f *testing.F) {
	f.Add(appendFrame(nil, FrameMessage, []byte(`{"method":"exec","exec":{"args":["a"]}}`)))
	f.Add(append(appendFrame(nil, FrameMore, []byte(`{"method":`)), appendFrame(nil, FrameMessage, []byte(`"info"}`))...))
	f.Add(appendFrame(nil, FrameError, []byte(`{"code":127,"message":"x"}`)))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, v := range []any{&Request{}, &Info{}, &FileInfo{}, &Empty{}} {
			_ = ReadMessage(bytes.NewReader(in), v) // must not panic
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, FrameStdout, []byte("out")), FrameExit, ExitPayload(3)))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		var again []byte
		for {
			fr, err := ReadFrame(r, nil)
			if err != nil {
				break
			}
			again = appendFrame(again, fr.Type, fr.Payload)
			_, _ = fr.ExitCode()
			_, _, _ = fr.Size()
			_ = fr.Err()
		}
		if !bytes.HasPrefix(in, again) {
			t.Fatal("frames that were read are not those that were there")
		}
	})
}
