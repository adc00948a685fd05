//go:build linux

package pageserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver/pstest"
	"fcvm/internal/uffd/uffdtest"
)

func TestMain(m *testing.M) {
	pstest.Main()
	os.Exit(uffdtest.Main(m))
}

// The size of the snapshot that tests serve.
const (
	testPages = 256
	guestSize = testPages * pageSize
)

// isHole tells which of its pages are zeros: some alone, and some runs.
func isHole(page int) bool { return pstest.IsHole(page) }

// memFile is a snapshot's memory file.
func memFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mem.img")
	if err := pstest.WriteSnapshot(path, testPages); err != nil {
		t.Fatal(err)
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

// clone is a VMM, a process of its own, that the fixture serves.
type clone struct{ *pstest.VMM }

// clone starts one that maps the template privately, where there is one, or else
// anonymous memory.
func (f *fixture) clone(t testing.TB) clone {
	t.Helper()
	if f.config.Template != nil {
		return f.cloneOf(t, pstest.Template)
	}
	return f.cloneOf(t, pstest.Anonymous)
}

func (f *fixture) cloneOf(t testing.TB, shape pstest.Shape) clone {
	t.Helper()
	v := f.vmm(t, pstest.Config{Shape: shape, Threads: 2, Regions: halves(f.source.size)})
	if err := v.Connect(pstest.Handshake{Socket: f.socket}); err != nil {
		t.Fatal(err)
	}
	return v
}

// halves are regions in descending order of addresses, as nothing promises another.
func halves(size int64) []pstest.Region {
	return []pstest.Region{{Offset: size / 2, Size: size / 2, Slot: 1}, {Size: size / 2}}
}

// vmm starts one that is not connected yet.
func (f *fixture) vmm(t testing.TB, c pstest.Config) clone {
	t.Helper()
	uffdtest.Require(t)
	var template *os.File
	if f.config.Template != nil {
		var err error
		// A clone maps a read-only description of the template.
		if template, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.config.Template.Fd())); err != nil {
			t.Fatal(err)
		}
		defer template.Close()
	}
	v, err := pstest.StartVMM(t.Context(), c, template)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Kill)
	return clone{v}
}

// handOver shakes hands for a VMM, as who attached to it does: it has a connection
// that is not the VMM's own.
func (f *fixture) handOver(t testing.TB, v clone) {
	t.Helper()
	fd, err := v.UFFD()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs to fetch descriptors of another process: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	var ms []Mapping
	for _, r := range v.Mapped() {
		ms = append(ms, Mapping{Addr: r.Addr, Size: uint64(r.Size), Offset: uint64(r.Offset)})
	}
	if err := SendHandshake(f.dial(t), int(fd.Fd()), v.pidfd(t), ms); err != nil {
		t.Fatal(err)
	}
}

// pidfd of the VMM, until the test ends.
func (c clone) pidfd(t testing.TB) int {
	t.Helper()
	fd, err := unix.PidfdOpen(c.PID(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// do has one thread do something.
func (c clone) do(t testing.TB, ops ...pstest.Op) *pstest.Result {
	t.Helper()
	r, err := c.Run(pstest.Script{Threads: [][]pstest.Op{ops}})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range r.Wrong() {
		t.Error(w)
	}
	return r
}

// begin is do, and does not wait for it: what comes of it is sent.
func (c clone) begin(ops ...pstest.Op) <-chan error {
	done := make(chan error, 1)
	go func() {
		r, err := c.Run(pstest.Script{Threads: [][]pstest.Op{ops}})
		if err == nil && len(r.Wrong()) > 0 {
			err = errors.New(strings.Join(r.Wrong(), ", "))
		}
		done <- err
	}()
	return done
}

// hasSnapshot, hasZeros and hasOwn read pages wholly, which may cause faults. Own is what
// write left: the snapshot with another first word.
func (c clone) hasSnapshot(t testing.TB, pages ...int) {
	t.Helper()
	c.do(t, pstest.Op{Kind: pstest.Check, Pages: list(pages), Expect: pstest.Expect{Snapshot: true}})
}

func (c clone) hasZeros(t testing.TB, pages ...int) {
	t.Helper()
	c.do(t, pstest.Op{Kind: pstest.Check, Pages: list(pages), Expect: pstest.Expect{Zero: true}})
}

func (c clone) hasOwn(t testing.TB, pages ...int) {
	t.Helper()
	c.do(t, pstest.Op{Kind: pstest.CheckWord, Pages: list(pages), Expect: pstest.Expect{Snapshot: true, Clone: 1, Version: 1}})
}

func (c clone) write(t testing.TB, pages ...int) {
	t.Helper()
	c.do(t, pstest.Op{Kind: pstest.Write, Pages: list(pages), Version: 1})
}

// discard gives pages back.
func (c clone) discard(t testing.TB, page, n int) {
	t.Helper()
	c.do(t, pstest.Op{Kind: pstest.Remove, Pages: pstest.Range(page, n)})
}

// killed waits until the VMM was, and nothing else.
func (c clone) killed(t testing.TB) {
	t.Helper()
	if how, err := c.Ended(time.Minute); err != nil || how != "signal: killed" {
		t.Errorf("VMM: %s, %v", how, err)
	}
}

func list(pages []int) pstest.Pages {
	var l []uint32
	for _, p := range pages {
		l = append(l, uint32(p))
	}
	return pstest.Pages{List: l}
}

// span are the pages from first to before end.
func span(first, end int) (pages []int) {
	for p := first; p < end; p++ {
		pages = append(pages, p)
	}
	return pages
}
