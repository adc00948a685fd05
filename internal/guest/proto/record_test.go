package proto

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func logOf(t testing.TB, recs ...LogRecord) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, r := range recs {
		if err := WriteLogRecord(&b, r); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func readLog(r io.Reader) (all []LogRecord) {
	lr := NewLogReader(r)
	for {
		rec, err := lr.Next()
		if err != nil {
			return all
		}
		rec.Data = bytes.Clone(rec.Data)
		all = append(all, rec)
	}
}

func TestLogRecords(t *testing.T) {
	now := time.Unix(1_800_000_000, 123456789)
	in := []LogRecord{
		{Stream: Stdout, Time: now, Data: []byte("hello\n")},
		{Stream: Stderr, Time: now, Data: nil},
		{Stream: Exit, Time: now, ExitCode: -3, Data: []byte("why")},
	}
	got := readLog(iotest.OneByteReader(bytes.NewReader(logOf(t, in...))))
	if len(got) != len(in) {
		t.Fatalf("read %d records, want %d", len(got), len(in))
	}
	for i, r := range got {
		if r.Stream != in[i].Stream || !r.Time.Equal(now) || !bytes.Equal(r.Data, in[i].Data) || r.ExitCode != in[i].ExitCode {
			t.Errorf("record %d: %+v, want %+v", i, r, in[i])
		}
	}
	long := strings.Repeat("x", 3*MaxRecordData+5)
	got = readLog(bytes.NewReader(logOf(t, LogRecord{Stream: Stdout, Data: []byte(long)})))
	var all string
	for _, r := range got {
		all += string(r.Data)
	}
	if all != long || len(got) != 4 {
		t.Errorf("long data came back as %d records of %d bytes", len(got), len(all))
	}
}

// A VMM that is killed leaves a torn record, and its successor appends.
func TestTornLog(t *testing.T) {
	a := logOf(t, LogRecord{Stream: Stdout, Data: []byte("one")})
	long := logOf(t, LogRecord{Stream: Stdout, Data: bytes.Repeat([]byte("x"), MaxRecordData)})
	flipped := bytes.Clone(a)
	flipped[len(flipped)-1] ^= 1
	for name, c := range map[string]struct {
		in   [][]byte
		want int
	}{
		"header torn":    {[][]byte{a[:10], a}, 1},
		"data torn":      {[][]byte{a[:len(a)-1], a}, 1},
		"long one torn":  {[][]byte{long[:9999], a, a}, 2},
		"changed":        {[][]byte{flipped, a}, 1},
		"noise":          {[][]byte{[]byte("noise\xfcLO"), a}, 1},
		"end torn":       {[][]byte{a, a[:20]}, 1},
		"length changed": {[][]byte{[]byte("\xfcLOG\x01\x00\xff\xff"), a}, 1},
	} {
		if got := readLog(bytes.NewReader(bytes.Join(c.in, nil))); len(got) != c.want {
			t.Errorf("%s: read %d records, want %d", name, len(got), c.want)
		}
	}
}

// Following a log means to read on after the end.
func TestGrowingLog(t *testing.T) {
	rec := logOf(t, LogRecord{Stream: Stdout, Data: []byte("one")})
	var b bytes.Buffer
	lr := NewLogReader(&b)
	for i := range rec {
		if _, err := lr.Next(); !errors.Is(err, io.EOF) {
			t.Fatalf("after %d bytes: %v, want EOF", i, err)
		}
		b.WriteByte(rec[i])
	}
	r, err := lr.Next()
	if err != nil || string(r.Data) != "one" {
		t.Fatalf("Next = %q, %v", r.Data, err)
	}
	if lr.Offset() != int64(len(rec)) {
		t.Errorf("Offset = %d, want %d", lr.Offset(), len(rec))
	}
}

func FuzzLogReader(f *testing.F) {
	a := logOf(f, LogRecord{Stream: Stdout, Data: []byte("one")}, LogRecord{Stream: Exit, ExitCode: 3})
	f.Add(a)
	f.Add(append(a[:30:30], a...))
	f.Fuzz(func(t *testing.T, in []byte) {
		lr := NewLogReader(bytes.NewReader(in))
		size := 0
		for {
			r, err := lr.Next()
			if err != nil {
				break
			}
			size += recordHeader + len(r.Data)
		}
		if size > len(in) || lr.Offset() > int64(len(in)) {
			t.Fatalf("%d bytes of records, offset %d, out of %d", size, lr.Offset(), len(in))
		}
	})
}
