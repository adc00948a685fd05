package proto_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"
	"time"

	"fcvm/internal/guest/proto"
)

// device is a log device's file, and what a guest does with it.
type device struct {
	t   *testing.T
	f   *os.File
	off int64
}

func newDevice(t *testing.T, off int64) *device {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "container.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(proto.LogDeviceBytes); err != nil {
		t.Skipf("this file system has no files of %d bytes: %v", int64(proto.LogDeviceBytes), err)
	}
	return &device{t, f, off}
}

func (d *device) Write(b []byte) (int, error) {
	s := proto.PackSectors(nil, b)
	if len(s)%proto.SectorBytes != 0 {
		d.t.Errorf("%d bytes are no sectors", len(s))
	}
	_, err := d.f.WriteAt(s, d.off)
	d.off += int64(len(s))
	return len(b), err
}

func (d *device) log(stream proto.Stream, data string, code int) {
	d.t.Helper()
	r := proto.LogRecord{Stream: stream, Time: time.Unix(1, 0), Data: []byte(data), ExitCode: code}
	if err := proto.WriteLogRecord(d, r); err != nil {
		d.t.Fatal(err)
	}
}

// drain reads all records that are there.
func drain(t *testing.T, r *proto.LogReader) []string {
	t.Helper()
	var all []string
	for {
		rec, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%d %.20s %d", rec.Stream, rec.Data, rec.ExitCode))
	}
}

// The reader follows a log that grows, be it a clone's, which begins anywhere.
func TestLogDevice(t *testing.T) {
	for _, off := range []int64{0, 512, 4096 * 3, 5<<20 + 1536} {
		d := newDevice(t, off)
		plain, err := proto.LogFile(d.f, -1)
		if err != nil {
			t.Fatal(err)
		}
		r := proto.NewLogReader(plain)
		if got := drain(t, r); got != nil {
			t.Errorf("from %d: an empty log has %q", off, got)
		}
		d.log(proto.Stdout, "first", 0)
		if got := fmt.Sprint(drain(t, r)); got != "[1 first 0]" {
			t.Errorf("from %d: %s", off, got)
		}
		zeros := string(make([]byte, 70000)) // fills sectors with nothing but zeros, and three records
		d.log(proto.Stderr, zeros, 0)
		d.log(proto.Exit, "", 7)
		if got := drain(t, r); len(got) != 4 || got[3] != "3  7" {
			t.Errorf("from %d: %q", off, got)
		}
		if got := drain(t, r); got != nil {
			t.Errorf("from %d: behind the end: %q", off, got)
		}
	}
}

func TestLogDeviceTail(t *testing.T) {
	d := newDevice(t, 8192)
	for i := range 5000 {
		d.log(proto.Stdout, fmt.Sprintf("line %d", i), 0)
	}
	d.log(proto.Exit, "", 3)
	r, err := proto.LogFile(d.f, 20000)
	if err != nil {
		t.Fatal(err)
	}
	got := drain(t, proto.NewLogReader(r))
	if n := len(got); n < 10 || n > 200 || got[n-1] != "3  3" {
		t.Errorf("%d records, the last %q", n, got[max(0, n-1):])
	}
	if r, err = proto.LogFile(d.f, 1<<40); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, proto.NewLogReader(r)); len(got) != 5001 || got[0] != "1 line 0 0" {
		t.Errorf("all: %d records", len(got))
	}
}

func TestLogFileOfAPlainLog(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "container.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := proto.LogFile(f, -1)
	if err != nil {
		t.Fatal(err)
	}
	lr := proto.NewLogReader(r)
	if got := drain(t, lr); got != nil {
		t.Errorf("an empty log has %q", got)
	}
	for i := range 100 {
		if err := proto.WriteLogRecord(f, proto.LogRecord{Stream: proto.Stdout, Data: []byte{byte('a' + i%26)}}); err != nil {
			t.Fatal(err)
		}
	}
	if got := drain(t, lr); len(got) != 100 {
		t.Errorf("%d records of 100", len(got))
	}
	if r, err = proto.LogFile(f, 260); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, proto.NewLogReader(r)); len(got) != 10 || got[9] != "1 v 0" {
		t.Errorf("the tail: %q", got)
	}
}

func FuzzLogDevice(f *testing.F) {
	f.Add(proto.PackSectors(nil, proto.AppendLogRecord(nil, proto.LogRecord{Stream: proto.Exit, ExitCode: 1})))
	f.Add(bytes.Repeat([]byte{0xff}, 600))
	dev, err := os.Create(filepath.Join(f.TempDir(), "container.log"))
	if err != nil {
		f.Fatal(err)
	}
	defer dev.Close()
	f.Fuzz(func(t *testing.T, content []byte) {
		// Punches out what was there.
		if err := errors.Join(dev.Truncate(0), dev.Truncate(proto.LogDeviceBytes)); err != nil {
			t.Skip(err)
		}
		if _, err := dev.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		r, err := proto.LogFile(dev, -1)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(iotest.OneByteReader(r))
		if err != nil || len(got) > len(content)+proto.SectorBytes {
			t.Errorf("%d bytes of %d, error %v", len(got), len(content), err)
		}
	})
}
