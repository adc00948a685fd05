package boot

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/link"
	"fcvm/internal/guest/proto"
)

// streamPort is a port whose socket is of another family: what it does with it is
// the same.
func streamPort(t *testing.T) (*vsockPort, func() net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 4)); err != nil {
		t.Fatal(err)
	}
	p, err := newVsockPort(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.listener.Close() })
	return p, func() net.Conn {
		t.Helper()
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
}

// Hosts come and go: each end of a connection is told once, and what the next one
// sends follows.
func TestVsockPortServesOneHostAfterTheOther(t *testing.T) {
	p, dial := streamPort(t)
	if _, err := p.Write([]byte("x")); !errors.Is(err, link.ErrHostGone) {
		t.Errorf("write to nobody: %v", err)
	}
	buf := make([]byte, 10)
	for range 3 {
		c := dial()
		waiting := dial() // is not accepted while the first is there
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if n, err := p.Read(buf); err != nil || string(buf[:n]) != "hello" {
			t.Fatalf("read %q, error %v", buf[:n], err)
		}
		if n, err := p.Write([]byte("answer")); n != 6 || err != nil {
			t.Fatalf("wrote %d, error %v", n, err)
		}
		if _, err := io.ReadFull(c, buf[:6]); err != nil || string(buf[:6]) != "answer" {
			t.Fatalf("the host read %q, error %v", buf[:6], err)
		}
		c.Close()
		if n, err := p.Read(buf); n != 0 || !errors.Is(err, link.ErrHostGone) {
			t.Fatalf("at the end: read %d, error %v", n, err)
		}
		if _, err := waiting.Write([]byte("next")); err != nil {
			t.Fatal(err)
		}
		if n, err := p.Read(buf); err != nil || string(buf[:n]) != "next" {
			t.Fatalf("of the next host: read %q, error %v", buf[:n], err)
		}
		waiting.Close()
		if _, err := p.Read(buf); !errors.Is(err, link.ErrHostGone) {
			t.Fatalf("at the next host's end: error %v", err)
		}
	}
}

// A host that does not read must not keep a session from ending.
func TestVsockPortWriteIsInterrupted(t *testing.T) {
	p, dial := streamPort(t)
	c := dial()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	if _, err := p.Read(buf); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error)
	go func() {
		for {
			if _, err := p.Write(buf); err != nil {
				failed <- err
				return
			}
		}
	}()
	p.Interrupt()
	if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	p.Restore()
	go func() { _, _ = io.Copy(io.Discard, c) }()
	if _, err := p.Write([]byte("y")); err != nil {
		t.Errorf("after Restore: %v", err)
	}
}

func TestLogDeviceHoldsWhatWasWritten(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(proto.LogDeviceBytes); err != nil {
		t.Skipf("this file system has no such large files: %v", err)
	}
	l := &logDevice{fd: int(f.Fd()), buf: make([]byte, logBuffer)}
	long := make([]byte, proto.MaxRecordData)
	for _, r := range []proto.LogRecord{
		{Stream: proto.Stdout, Time: time.Unix(1, 0), Data: []byte("one")},
		{Stream: proto.Stderr, Time: time.Unix(2, 0), Data: long},
		{Stream: proto.Exit, Time: time.Unix(3, 0), ExitCode: 42},
	} {
		if err := proto.WriteLogRecord(l, r); err != nil {
			t.Fatal(err)
		}
	}
	r, err := proto.LogFile(f, -1)
	if err != nil {
		t.Fatal(err)
	}
	log := proto.NewLogReader(r)
	var last proto.LogRecord
	for i, want := range []int{3, len(long), 0} {
		if last, err = log.Next(); err != nil || len(last.Data) != want {
			t.Fatalf("record %d: %d bytes, error %v", i, len(last.Data), err)
		}
	}
	if last.ExitCode != 42 {
		t.Errorf("exit code %d", last.ExitCode)
	}
	if _, err := l.Write(make([]byte, logBuffer)); err == nil {
		t.Error("what is longer than any record is let through")
	}
	if _, err := openLogDevice("/etc/passwd"); err == nil {
		t.Error("a file is taken for a log device")
	}
}
