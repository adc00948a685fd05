//go:build linux

package pstest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"fcvm/internal/uffd/uffdtest"
)

func TestMain(m *testing.M) {
	Main()
	code := uffdtest.Main(m)
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// built is our page server, for all tests.
var built struct {
	sync.Once
	dir string
	err error
}

// handler builds our page server, under the race detector if this test is.
func handler(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("needs the go command")
	}
	built.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "pstest"); built.err == nil {
			built.err = build(built.dir + "/uffd_handler")
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.dir + "/uffd_handler"
}

func build(binary string, flags ...string) error {
	args := append([]string{"build", "-buildvcs=false", "-o", binary}, flags...)
	// As it is shipped, without cgo: else it does not confine itself.
	cgo := "CGO_ENABLED=0"
	if raceEnabled {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	cmd := exec.Command("go", append(args, "fcvm/cmd/uffd_handler")...)
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build uffd_handler: %w: %s", err, out)
	}
	return nil
}

func startServer(t testing.TB, pages int, args ...string) *Server {
	t.Helper()
	uffdtest.Require(t)
	s, err := StartServer(args, pages)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the page server says:\n%s", s.Log())
		}
	})
	return s
}

func startVMM(t testing.TB, c Config, s *Server) *VMM {
	t.Helper()
	uffdtest.Require(t)
	var template *os.File
	if s != nil {
		template = s.Template
	}
	v, err := StartVMM(t.Context(), c, template)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Kill)
	return v
}

// A VMM sees its snapshot, what it wrote, and what it gave back.
func TestVMM(t *testing.T) {
	const pages = 256
	binary := handler(t)
	for _, shape := range []Shape{Anonymous, Template} {
		t.Run(string(shape), func(t *testing.T) {
			s := startServer(t, pages, binary, "{socket}", "{mem}", "--policy", "share", "--template", "{template}")
			v := startVMM(t, Config{Shape: shape, Threads: 2, Clone: 3, Regions: []Region{
				{Offset: 0, Size: 100 * PageSize, Slot: 1}, {Offset: 100 * PageSize, Size: 156 * PageSize},
			}}, s)
			if err := v.Connect(Handshake{Socket: s.Socket}); err != nil {
				t.Fatal(err)
			}
			whole := Range(0, pages)
			r, err := v.Run(Script{Threads: [][]Op{
				{
					{Kind: Read, Pages: Pages{Count: pages, Shuffle: 1}, Latencies: true},
					{Kind: Check, Pages: whole, Expect: Expect{Snapshot: true}},
					{Kind: Barrier},
					{Kind: Barrier},
					{Kind: Check, Pages: whole, Expect: Expect{Snapshot: true}},
				},
				{
					{Kind: Barrier},
					{Kind: Fill, Pages: Page(7), Version: 2},
					{Kind: Check, Pages: Page(7), Expect: Expect{Clone: 3, Version: 2}},
					{Kind: Remove, Pages: Range(7, 3)},
					{Kind: Check, Pages: Range(7, 3), Expect: Expect{Zero: true, Snapshot: shape == Template}},
					{Kind: Write, Pages: Page(80), Version: 4},
					{Kind: Barrier},
				},
			}})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", r.Threads[0])
			wrong := strings.Join(r.Wrong(), "\n")
			if !strings.Contains(wrong, "page 80 holds page 80 as clone 3 wrote it (version 4) in words 0 to 0, zeros in words 1 to 511, want the snapshot's zeros") {
				t.Errorf("a write was not seen: %s", wrong)
			}
			if shape == Anonymous && !strings.Contains(wrong, "page 7 holds zeros, want the snapshot's page") {
				t.Errorf("a removal was not seen: %s", wrong)
			}
			if strings.Contains(wrong, "thread 1") {
				t.Error(wrong)
			}
			first := r.Threads[0]
			if len(first[0].Latencies) != pages || first[1].Snapshot+first[1].Zero != pages {
				t.Errorf("%d latencies, %d pages checked", len(first[0].Latencies), first[1].Snapshot+first[1].Zero)
			}
			if err := v.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Threads that nobody answers are told of, by page.
func TestHangIsFound(t *testing.T) {
	v := startVMM(t, Config{Shape: Anonymous, Threads: 3, Regions: []Region{{Size: 8 * PageSize}}}, nil)
	_, err := v.Run(Script{Patience: time.Second, Threads: [][]Op{
		{{Kind: Sleep}, {Kind: Read, Pages: Range(3, 2)}},
		{{Kind: AwaitAsleep, Others: []int{0, 2}, Steps: []int{1, 0}}},
		{{Kind: Remove, Pages: Range(2, 3)}},
	}})
	if !errors.Is(err, ErrHung) || !strings.Contains(err.Error(), "thread 0: operation 1, read of page 3, tid") || !strings.Contains(err.Error(), "thread 2: operation 0, remove of page 2") {
		t.Errorf("got %v", err)
	}
	if strings.Contains(err.Error(), "thread 1") {
		t.Errorf("the one that waited is done, and yet: %v", err)
	}
}

func TestVMMEnds(t *testing.T) {
	for kind, want := range map[Kind]string{Exit: "exit status 7", Die: "signal: killed"} {
		v := startVMM(t, Config{Shape: Anonymous, Threads: 2, Regions: []Region{{Size: PageSize}}}, nil)
		_, err := v.Run(Script{Threads: [][]Op{
			{{Kind: Read, Pages: Page(0)}},
			{{Kind: AwaitAsleep, Others: []int{0}, Steps: []int{0}}, {Kind: kind}},
		}})
		if !errors.Is(err, ErrEnded) {
			t.Errorf("%s: got %v", kind, err)
		}
		if how, err := v.Ended(time.Minute); how != want || err != nil {
			t.Errorf("%s: it ended by %s, %v", kind, how, err)
		}
	}
}

// Memory without a userfaultfd shows what is in the file, and keeps what is written
// to itself.
func TestPlain(t *testing.T) {
	const pages = 64
	path := filepath.Join(t.TempDir(), "mem")
	if err := WriteSnapshot(path, pages); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	v := startVMM(t, Config{Shape: Plain, Clone: 2, Regions: []Region{{Size: pages * PageSize}}}, &Server{Template: file})
	if at := v.Mapped(); len(at) != 1 || at[0].Addr == 0 || at[0].Size != pages*PageSize {
		t.Errorf("mapped at %+v", at)
	}
	begin := Clock() + 10*time.Millisecond
	r, err := v.Run(Script{Threads: [][]Op{{
		{Kind: Sleep, Until: begin},
		{Kind: Check, Pages: Range(0, pages), Expect: Expect{Snapshot: true}},
		{Kind: Read, Pages: Range(0, pages), Writes: []bool{4: true}},
		{Kind: Read, Pages: Page(4)},
		{Kind: Fill, Pages: Page(4), Version: 2},
		{Kind: Check, Pages: Page(4), Expect: Expect{Clone: 2, Version: 2}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if wrong := r.Wrong(); len(wrong) > 0 {
		t.Error(wrong)
	}
	ops := r.Threads[0]
	if ops[1].Began < begin || ops[2].Began < ops[1].Began {
		t.Errorf("was to begin at %v, and read at %v and %v", begin, ops[1].Began, ops[2].Began)
	}
	sum := uint64(0)
	buf := make([]byte, PageSize)
	for p := range pages {
		if p != 4 {
			SnapshotPage(buf, p)
			sum += binary.NativeEndian.Uint64(buf)
		}
	}
	if want := (mark{clone: 2, page: 4, version: 1}).first(); ops[2].Sum != sum || ops[3].Sum != want {
		t.Errorf("read %#x and %#x, want %#x and %#x", ops[2].Sum, ops[3].Sum, sum, want)
	}
	if err := v.Connect(Handshake{Socket: "unused"}); err == nil {
		t.Error("a handshake without a userfaultfd")
	}
}
