//go:build linux

package pageserver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/uffd/uffdtest"
)

// envChild makes the test binary another process, see child_test.go.
const envChild = "FCVM_TEST_PAGESERVER"

func TestMain(m *testing.M) {
	if mode := os.Getenv(envChild); mode != "" {
		os.Exit(child(mode))
	}
	os.Exit(uffdtest.Main(m))
}

// testPages is the size of the snapshot that tests serve.
const testPages = 256

// isHole tells which of its pages are zeros: some alone, and a long run.
func isHole(page int) bool { return page%5 == 2 || page >= 96 && page < 160 }

// content is what a page of the snapshot holds; no two are alike.
func content(page int) []byte {
	b := make([]byte, pageSize)
	if !isHole(page) {
		for i := 0; i < pageSize; i += 8 {
			binary.NativeEndian.PutUint64(b[i:], uint64(page)<<32|uint64(i)|1)
		}
	}
	return b
}

// memFile is a snapshot's memory file.
func memFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mem.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(testPages * pageSize); err != nil {
		t.Fatal(err)
	}
	for p := range testPages {
		if isHole(p) {
			continue
		}
		if _, err := f.WriteAt(content(p), int64(p)*pageSize); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// memfd is an empty template.
func memfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("template", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "template")
	t.Cleanup(func() { f.Close() })
	return f
}

// fixture is a server within the test.
type fixture struct {
	*Server
	socket, control string
	// end stops it and returns what Serve did.
	end func() error
}

func testConfig(t testing.TB, policy Policy) Config {
	c := Config{MemFile: memFile(t), Policy: policy, Log: slog.New(slog.NewTextHandler(testLog{t}, nil))}
	if policy == PolicyShare {
		c.Template = memfd(t)
	}
	return c
}

// testLog shows the server's log with the test that it belongs to.
type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(b))
	return len(b), nil
}

func serve(t testing.TB, c Config) *fixture {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return serveWith(t, s)
}

func serveWith(t testing.TB, s *Server) *fixture {
	t.Helper()
	dir, err := os.MkdirTemp("", "ps") // short: t.TempDir holds the test's name
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{Server: s, socket: filepath.Join(dir, "s"), control: filepath.Join(dir, "c")}
	l, err := Listen(t.Context(), f.socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Listen(t.Context(), f.control, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Serve(ctx, l, c) }()
	var once bool
	f.end = func() error {
		if once {
			return nil
		}
		once = true
		cancel()
		return errors.Join(<-result, s.Close())
	}
	t.Cleanup(func() {
		if err := f.end(); err != nil {
			t.Errorf("serve: %v", err)
		}
		os.RemoveAll(dir)
	})
	return f
}

// dial connects to the handshake socket.
func (f *fixture) dial(t testing.TB) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: f.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// sessions waits until there are n.
func (f *fixture) sessions(t testing.TB, n int) []SessionStats {
	t.Helper()
	return eventually(t, func() ([]SessionStats, bool) {
		st := f.Stats().Sessions
		return st, len(st) == n
	})
}

// failure waits for the first.
func (f *fixture) failure(t testing.TB) Failure {
	t.Helper()
	return eventually(t, func() (Failure, bool) {
		if st := f.Stats().Failures; len(st) > 0 {
			return st[0], true
		}
		return Failure{}, false
	})
}

// stand is another process, which does nothing, and stands for the VMM when the
// memory is this process's own.
type stand struct {
	cmd   *exec.Cmd
	pidfd int
	in    io.Closer
}

// childCommand runs the test binary as another process.
func childCommand(mode string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	// The race detector sleeps for a second when a process ends, unless told.
	cmd.Env = append(os.Environ(), envChild+"="+mode, "GORACE=atexit_sleep_ms=0")
	return cmd
}

func newStand(t testing.TB) *stand {
	t.Helper()
	cmd := childCommand("stand")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &stand{cmd: cmd, in: in}
	if s.pidfd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
		unix.Close(s.pidfd)
	})
	return s
}

// memory is a clone whose memory is this process's.
type memory struct {
	*stand
	mem  []byte
	fd   *uffd.FD
	conn *net.UnixConn
}

// clone maps memory and shakes hands: the template privately, or anonymous memory.
func (f *fixture) clone(t testing.TB) *memory {
	t.Helper()
	file := -1
	if f.config.Template != nil {
		file = int(f.config.Template.Fd())
	}
	return f.cloneOf(t, uffdtest.Map(t, testPages, file))
}

func (f *fixture) cloneOf(t testing.TB, mem []byte) *memory {
	t.Helper()
	m := &memory{stand: newStand(t), mem: mem, fd: uffdtest.Open(t), conn: f.dial(t)}
	addr := uffdtest.Address(mem)
	if _, err := m.fd.Register(addr, uint64(len(mem)), uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	// Regions in descending order of addresses, as nothing promises another.
	half := uint64(len(mem) / 2)
	err := m.fd.Use(func(fd int) error {
		return SendHandshake(m.conn, fd, m.pidfd, []Mapping{
			{Addr: addr + half, Size: half, Offset: half}, {Addr: addr, Size: half},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// expect reads a page, which may cause a fault.
func (m *memory) expect(t testing.TB, page int, want []byte) {
	t.Helper()
	<-uffdtest.Touch(t, m.mem, page*pageSize, false)
	if !bytes.Equal(m.mem[page*pageSize:(page+1)*pageSize], want) {
		t.Errorf("page %d holds %x…, want %x…", page, m.mem[page*pageSize:page*pageSize+16], want[:16])
	}
}

func (m *memory) write(t testing.TB, page int) {
	t.Helper()
	<-uffdtest.Touch(t, m.mem, page*pageSize, true)
}

// discard gives pages back.
func (m *memory) discard(t testing.TB, page, n int) {
	t.Helper()
	if err := unix.Madvise(m.mem[page*pageSize:(page+n)*pageSize], unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}
