package procmem

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm"
)

// The tests re-execute themselves as a process whose memory is then read: it
// maps memory as a VMM does, does what its standard input says, and answers.

const envTarget = "FCVM_TEST_PROCMEM_TARGET"

// op is one line of the target's input.
type op struct {
	Do string // "map", "fill", "read", "discard"
	// Pages of the mapping; or the first page and the number of pages to touch,
	// each Step pages.
	First, Pages, Step int
	File               string // mapped MAP_PRIVATE, or empty for anonymous memory
	Byte               byte
}

var page = os.Getpagesize()

// readSink keeps the compiler from leaving out the target's reads.
var readSink byte

func TestMain(m *testing.M) {
	if os.Getenv(envTarget) != "" {
		if err := target(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func target() error {
	var mem []byte
	dec, enc := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var o op
		if err := dec.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		o.Step = max(o.Step, 1)
		switch o.Do {
		case "map":
			fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
			if o.File != "" {
				f, err := os.Open(o.File)
				if err != nil {
					return err
				}
				fd, flags = int(f.Fd()), unix.MAP_PRIVATE|unix.MAP_NORESERVE
			}
			var err error
			if mem, err = unix.Mmap(fd, 0, o.Pages*page, unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
				return err
			}
			// Huge pages would make the pages that tests touch more than they say.
			if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
				return err
			}
		case "fill":
			for i := range o.Pages {
				p := mem[(o.First+i*o.Step)*page:][:page]
				for j := range p {
					p[j] = o.Byte
				}
			}
		case "read":
			for i := range o.Pages {
				readSink += mem[(o.First+i*o.Step)*page]
			}
		case "discard":
			if err := unix.Madvise(mem[o.First*page:][:o.Pages*page], unix.MADV_DONTNEED); err != nil {
				return err
			}
		}
		if err := enc.Encode(uint64(addrOf(mem))); err != nil {
			return err
		}
	}
}

// remote is a target process.
type remote struct {
	*Process
	t    testing.TB
	in   *json.Encoder
	out  *bufio.Reader
	addr uint64
	size int64
	cmd  *exec.Cmd
}

func start(t testing.TB, pages int, file string) *remote {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r := &remote{t: t, cmd: exec.Command(self), size: int64(pages * page)}
	r.cmd.Env = append(os.Environ(), envTarget+"=1")
	r.cmd.Stderr = os.Stderr
	in, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.in, r.out = json.NewEncoder(in), bufio.NewReader(out)
	t.Cleanup(func() {
		in.Close()
		_ = r.cmd.Wait() // a test may have killed it
	})
	r.do(op{Do: "map", Pages: pages, File: file})
	if r.Process, err = Open(r.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *remote) do(o op) {
	r.t.Helper()
	if err := r.in.Encode(o); err != nil {
		r.t.Fatal(err)
	}
	line, err := r.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r.addr)
	}
	if err != nil {
		r.t.Fatalf("target, %+v: %v", o, err)
	}
}

func (r *remote) regions() []vmm.Region {
	// Two regions, so that both addresses and offsets have to add up.
	half := r.size / 2 / int64(page) * int64(page)
	return []vmm.Region{{Addr: r.addr, Size: half}, {Addr: r.addr + uint64(half), Size: r.size - half, Offset: half}}
}

func (r *remote) private() string {
	r.t.Helper()
	var b bytes.Buffer
	err := r.Private(r.addr, r.size, func(run Run) error {
		fmt.Fprintf(&b, "%d+%d ", run.Offset/int64(page), run.Len/int64(page))
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return b.String()
}

// template makes a file of that many pages, page i full of byte(i%250+1).
func template(t testing.TB, pages int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "template")
	b := make([]byte, pages*page)
	for i := range b {
		b[i] = byte(i/page%250 + 1)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// ways runs a test with PAGEMAP_SCAN and process_vm_readv, and with what older
// kernels have.
func ways(t *testing.T, f func(t *testing.T, tune func(*Process))) {
	t.Run("scan", func(t *testing.T) {
		f(t, func(p *Process) {
			if !p.scan {
				t.Skip("the kernel has no PAGEMAP_SCAN (Linux 6.7)")
			}
		})
	})
	t.Run("pagemap", func(t *testing.T) {
		f(t, func(p *Process) { p.scan = false })
	})
	t.Run("procmem", func(t *testing.T) {
		f(t, func(p *Process) { p.slow.Store(true) })
	})
}

func TestPrivateAnonymous(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 5000, "")
		tune(r.Process)
		if got := r.private(); got != "" {
			t.Errorf("untouched: %q", got)
		}
		r.do(op{Do: "fill", First: 3, Pages: 2, Byte: 1})
		r.do(op{Do: "fill", First: 4998, Pages: 2, Byte: 1})
		if got := r.private(); got != "3+2 4998+2 " {
			t.Errorf("got %q", got)
		}
		r.do(op{Do: "read", First: 100, Pages: 10})
		if want := "3+2 4998+2 "; r.scan && r.private() != want {
			t.Errorf("with the zero page: got %q, want %q", r.private(), want)
		}
		r.do(op{Do: "discard", First: 100, Pages: 10})
		r.do(op{Do: "discard", First: 3, Pages: 1})
		if got := r.private(); got != "4+1 4998+2 " {
			t.Errorf("after a discard: got %q", got)
		}
		n, err := r.PrivateBytes(r.addr, r.size)
		if err != nil || n != int64(3*page) {
			t.Errorf("PrivateBytes: %d, %v", n, err)
		}
	})
}

// TestPrivateManyRuns has more runs than one call of PAGEMAP_SCAN returns.
func TestPrivateManyRuns(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 10000, "")
		tune(r.Process)
		r.do(op{Do: "fill", Pages: 5000, Step: 2, Byte: 1})
		next := int64(0)
		err := r.Private(r.addr, r.size, func(run Run) error {
			if run.Offset != next*int64(page) || run.Len != int64(page) {
				t.Fatalf("got %+v, want page %d", run, next)
			}
			next += 2
			return nil
		})
		if err != nil || next != 10000 {
			t.Errorf("ended at page %d, %v", next, err)
		}
	})
}

func TestPrivateOfATemplate(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 1000, template(t, 1000))
		tune(r.Process)
		r.do(op{Do: "read", Pages: 1000})
		if got := r.private(); got != "" {
			t.Errorf("pages that were only read: %q", got)
		}
		r.do(op{Do: "fill", First: 10, Pages: 3, Step: 5, Byte: 9})
		if got := r.private(); got != "10+1 15+1 20+1 " {
			t.Errorf("got %q", got)
		}
	})
}

func TestPrivateStops(t *testing.T) {
	r := start(t, 10, "")
	r.do(op{Do: "fill", Pages: 5, Step: 2, Byte: 1})
	stop := errors.New("stop")
	calls := 0
	err := r.Private(r.addr, r.size, func(Run) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
	if err := r.Private(r.addr+1, r.size, nil); err == nil {
		t.Error("an odd address is taken")
	}
}

// dump dumps to a file and compares it with want.
func dump(t *testing.T, r *remote, out *os.File, o Options, want []byte) Result {
	t.Helper()
	res, err := r.Dump(t.Context(), r.regions(), out, o)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, r.size)
	if _, err := out.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(got); i += page {
		if !bytes.Equal(got[i:i+page], want[i:i+page]) {
			t.Fatalf("page %d has %d, want %d", i/page, got[i], want[i])
		}
	}
	return res
}

func create(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "mem.img"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// set makes pages of a buffer hold a byte, as the op "fill" does.
func set(b []byte, o op) {
	for i := range o.Pages {
		p := b[(o.First+i*max(o.Step, 1))*page:][:page]
		for j := range p {
			p[j] = o.Byte
		}
	}
}

func TestDumpFresh(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 3000, "")
		tune(r.Process)
		want := make([]byte, r.size)
		// Long runs, scattered pages, and pages that were written with zeros.
		for _, o := range []op{
			{First: 0, Pages: 700, Byte: 1}, {First: 1000, Pages: 500, Step: 3, Byte: 2}, {First: 2990, Pages: 10, Byte: 3}, {First: 100, Pages: 50, Byte: 0},
		} {
			o.Do = "fill"
			r.do(o)
			set(want, o)
		}
		r.do(op{Do: "read", First: 2700, Pages: 20})
		out := create(t, r.size)
		res := dump(t, r, out, Options{}, want)
		if n := int64(700+500+10) * int64(page); r.scan && res.Private != n || res.Written != n-50*int64(page) {
			t.Errorf("result %+v", res)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(out.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		// File systems allocate a little more than was written, and no zeros.
		if st.Blocks*512 > res.Written+64*int64(page) {
			t.Errorf("%d bytes occupied for %d written", st.Blocks*512, res.Written)
		}
	})
}

// TestDumpOverParent: the file holds the parent's memory, and pages that the
// process turned to zeros must not show the parent's content.
func TestDumpOverParent(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		path := template(t, 2000)
		r := start(t, 2000, path)
		tune(r.Process)
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range []op{{First: 10, Pages: 300, Step: 2, Byte: 0}, {First: 11, Pages: 5, Step: 4, Byte: 255}, {First: 1900, Pages: 100, Byte: 0}, {First: 999, Pages: 2, Byte: 77}} {
			o.Do = "fill"
			r.do(o)
			set(want, o)
		}
		src, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		out := create(t, 0)
		if err := CloneParent(t.Context(), src, out); err != nil {
			t.Fatal(err)
		}
		res := dump(t, r, out, Options{Base: true}, want)
		if res.Written != 7*int64(page) || res.Zero < 400*int64(page) {
			t.Errorf("result %+v", res)
		}
	})
}

// TestDumpZeroPageOverParent: where the process has the kernel's zero page, as
// after UFFDIO_ZEROPAGE of a page that the balloon gave back, the file must too.
func TestDumpZeroPageOverParent(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 100, "")
		tune(r.Process)
		r.do(op{Do: "read", First: 20, Pages: 30})
		out := create(t, r.size)
		want := make([]byte, r.size)
		set(want, op{Pages: 100, Byte: 5})
		if _, err := out.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		set(want, op{First: 20, Pages: 30, Byte: 0})
		dump(t, r, out, Options{Base: true}, want)
	})
}

// TestDumpTwice: the first while the process still works, the second in the
// pause, which writes only what changed.
func TestDumpTwice(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 1500, "")
		tune(r.Process)
		want := make([]byte, r.size)
		out := create(t, r.size)
		step := func(o op) {
			o.Do = "fill"
			r.do(o)
			set(want, o)
		}
		step(op{Pages: 1000, Byte: 1})
		dump(t, r, out, Options{}, want)
		step(op{First: 5, Pages: 3, Byte: 0})    // now zero
		step(op{First: 900, Pages: 50, Byte: 2}) // now different
		step(op{First: 1200, Pages: 4, Byte: 3}) // new
		step(op{First: 1300, Pages: 4, Byte: 0}) // new, and zero
		r.do(op{Do: "discard", First: 600, Pages: 10})
		r.do(op{Do: "read", First: 600, Pages: 10})
		set(want, op{First: 600, Pages: 10, Byte: 0})
		res := dump(t, r, out, Options{Compare: true}, want)
		if res.Written != 54*int64(page) {
			t.Errorf("result %+v", res)
		}
	})
}

func TestDumpOfAProcessThatEnded(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 100, "")
		tune(r.Process)
		r.do(op{Do: "fill", Pages: 100, Byte: 1})
		if err := r.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = r.cmd.Wait() // "signal: killed"
		_, err := r.Dump(t.Context(), r.regions(), create(t, r.size), Options{})
		if !errors.Is(err, ErrGone) {
			t.Errorf("got %v", err)
		}
		if _, err := Open(r.cmd.Process.Pid); !errors.Is(err, ErrGone) {
			t.Errorf("Open: %v", err)
		}
	})
}

func TestReadAt(t *testing.T) {
	ways(t, func(t *testing.T, tune func(*Process)) {
		r := start(t, 100, "")
		tune(r.Process)
		r.do(op{Do: "fill", First: 40, Pages: 1, Byte: 7})
		b := make([]byte, 3*page)
		if n, err := r.ReadAt(b, int64(r.addr)+int64(39*page)); n != len(b) || err != nil {
			t.Fatalf("read %d bytes, %v", n, err)
		}
		want := make([]byte, 3*page)
		set(want, op{First: 1, Pages: 1, Byte: 7})
		if !bytes.Equal(b, want) {
			t.Error("other content")
		}
		if n, err := r.ReadAt(nil, int64(r.addr)); n != 0 || err != nil {
			t.Errorf("nothing: %d bytes, %v", n, err)
		}
		if n, err := r.ReadAt(b[:16], 0x1000); n != 0 || err == nil {
			t.Errorf("where nothing is mapped: %d bytes, %v", n, err)
		}
		if err := r.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = r.cmd.Wait() // "signal: killed"
		if _, err := r.ReadAt(b, int64(r.addr)); !errors.Is(err, ErrGone) {
			t.Errorf("after the end: %v", err)
		}
	})
}

func TestDumpCancelled(t *testing.T) {
	r := start(t, 5000, "")
	r.do(op{Do: "fill", Pages: 5000, Byte: 1})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Dump(ctx, r.regions(), create(t, r.size), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestDumpDiskFull(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no /dev/full: %v", err)
	}
	defer full.Close()
	r := start(t, 3000, "")
	r.do(op{Do: "fill", Pages: 3000, Byte: 1})
	if _, err := r.Dump(t.Context(), r.regions(), full, Options{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
}
