//go:build linux

package pageserver

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver/pstest"
)

// What Firecracker 1.12 sends for a guest of 4 GiB, with a gap below 4 GiB.
const firecracker = `[{"base_host_virt_addr":140320400441344,"size":3221225472,"offset":0,"page_size":4096,"page_size_kib":4096},` +
	`{"base_host_virt_addr":140318252957696,"size":1073741824,"offset":3221225472,"page_size":4096,"page_size_kib":4096}]`

// mappingCases are handshakes for a memory file of 4 GiB, and what is wrong with them.
var mappingCases = []struct{ name, json, want string }{
	{"firecracker", firecracker, ""},
	{"older name of the page size", `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":4096}]`, ""},
	{"newer name alone", `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]`, ""},
	{"huge pages", `[{"base_host_virt_addr":2097152,"size":4194304,"offset":2097152,"page_size":2097152}]`, ""},
	{"fields of later versions", `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"node":1}]`, ""},
	{"not JSON", `{[`, "parse handshake"},
	{"an object", `{}`, "parse handshake"},
	{"negative", `[{"base_host_virt_addr":-1}]`, "parse handshake"},
	{"too large", `[{"base_host_virt_addr":18446744073709551616}]`, "parse handshake"},
	{"no regions", `[]`, "no regions"},
	{"null", `null`, "no regions"},
	{"no page size", `[{"base_host_virt_addr":4096,"size":4096,"offset":0}]`, "pages of 0 bytes"},
	{"odd page size", `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4}]`, "pages of 4 bytes"},
	{"page sizes differ", `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":4}]`, "pages of 4096 and of 4 bytes"},
	{"page sizes of regions differ", `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096},{"base_host_virt_addr":2097152,"size":2097152,"offset":2097152,"page_size":2097152}]`, "another size"},
	{"address within a page", `[{"base_host_virt_addr":4097,"size":4096,"offset":0,"page_size":4096}]`, "not whole pages"},
	{"size of half a page", `[{"base_host_virt_addr":4096,"size":2048,"offset":0,"page_size":4096}]`, "not whole pages"},
	{"offset within a page", `[{"base_host_virt_addr":4096,"size":4096,"offset":1,"page_size":4096}]`, "not whole pages"},
	{"empty region", `[{"base_host_virt_addr":4096,"size":0,"offset":0,"page_size":4096}]`, "not whole pages"},
	{"address 0", `[{"base_host_virt_addr":0,"size":4096,"offset":0,"page_size":4096}]`, "not in user space"},
	{"wraps around", `[{"base_host_virt_addr":18446744073709547520,"size":8192,"offset":0,"page_size":4096}]`, "not in user space"},
	{"behind the file", `[{"base_host_virt_addr":4096,"size":4096,"offset":4294967296,"page_size":4096}]`, "behind the memory file"},
	{"across the file's end", `[{"base_host_virt_addr":4096,"size":8192,"offset":4294963200,"page_size":4096}]`, "behind the memory file"},
	{"offset wraps around", `[{"base_host_virt_addr":4096,"size":8192,"offset":18446744073709547520,"page_size":4096}]`, "behind the memory file"},
	{"addresses overlap", `[{"base_host_virt_addr":8192,"size":8192,"offset":0,"page_size":4096},{"base_host_virt_addr":4096,"size":8192,"offset":8192,"page_size":4096}]`, "overlap at address 0x2000"},
	{"offsets overlap", `[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096},{"base_host_virt_addr":65536,"size":8192,"offset":4096,"page_size":4096}]`, "overlap in the memory file at 0x1000"},
}

func TestParseMappings(t *testing.T) {
	for _, c := range mappingCases {
		t.Run(c.name, func(t *testing.T) {
			ms, err := parseMappings([]byte(c.json))
			if err == nil {
				ms, err = checkMappings(ms, 4<<30)
			}
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("got %+v, %v, want %q", ms, err, c.want)
			}
			for i := 1; i < len(ms); i++ {
				if ms[i-1].Addr > ms[i].Addr {
					t.Errorf("not by address: %+v", ms)
				}
			}
		})
	}
}

func FuzzMappings(f *testing.F) {
	for _, c := range mappingCases {
		f.Add([]byte(c.json), int64(4<<30))
	}
	f.Add([]byte(`[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]`), int64(4096))
	f.Fuzz(func(t *testing.T, body []byte, size int64) {
		if size <= 0 {
			return
		}
		ms, err := parseMappings(body)
		if err != nil {
			return
		}
		if ms, err = checkMappings(ms, size); err != nil {
			return
		}
		// Every page of every region is in the file, and found by its address.
		s := session{regions: ms}
		for _, m := range ms {
			for _, addr := range []uint64{m.Addr, m.Addr + m.Size - m.PageSize} {
				r, ok := s.region(addr)
				if off := r.Offset + addr - r.Addr; !ok || r != m || off+m.PageSize > uint64(size) {
					t.Fatalf("address %#x is in %+v, %v, of %+v", addr, r, ok, ms)
				}
			}
			if r, ok := s.region(m.Addr + m.Size); ok && r == m {
				t.Fatalf("the end of %+v belongs to it", m)
			}
		}
	})
}

// However the bytes and descriptors of a handshake arrive, it is what its bytes say,
// and no descriptor is left behind.
func FuzzReceiveHandshake(f *testing.F) {
	for i, c := range mappingCases {
		f.Add([]byte(c.json), uint16(i*7), uint8(i%4), uint8(i%3))
	}
	f.Add([]byte(firecracker+firecracker), uint16(len(firecracker)), uint8(1), uint8(0))
	f.Add([]byte(" "+firecracker+" \n"), uint16(1), uint8(2), uint8(1))
	f.Add([]byte(strings.Repeat("[", 9000)+strings.Repeat("]", 9000)), uint16(4096), uint8(1), uint8(0))
	f.Add([]byte("["+strings.Repeat(" ", maxHandshake)+"]"), uint16(4096), uint8(1), uint8(2))
	f.Fuzz(func(t *testing.T, body []byte, piece uint16, fds, with uint8) {
		fds %= 12
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		a, b := socketpair(t)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			defer a.Close()
			defer w.Close()
			rest, size := body, max(int(piece), len(body)/64, 1)
			for n := uint8(0); len(rest) > 0; n++ {
				var rights []int
				if n == with || len(rest) <= size && n < with {
					rights = slices.Repeat([]int{int(w.Fd())}, int(fds))
				}
				send(t, a, string(rest[:min(size, len(rest))]), rights...)
				rest = rest[min(size, len(rest)):]
			}
		}()
		h, err := receiveHandshake(b)
		if err == nil {
			if len(h.fds) != int(fds) || fds < 1 || fds > 2 {
				t.Errorf("%d of %d descriptors", len(h.fds), fds)
			}
			// It may have been complete before the end of what was sent.
			says := false
			for n := len(body); n > 0 && !says; n-- {
				if n == len(body) || body[n-1] == ']' {
					ms, err := parseMappings(body[:n])
					says = err == nil && slices.Equal(ms, h.mappings)
				}
			}
			if !says {
				t.Errorf("%s was taken for %+v", body, h.mappings)
			}
			h.close()
		}
		b.Close()
		<-sent
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the pipe is open somewhere: %v", err)
		}
	})
}

func FuzzControl(f *testing.F) {
	f.Add([]byte(`{"op":"stats"}`))
	f.Add([]byte(`{"op":"shutdown","force":true}`))
	f.Add([]byte(`{"op":"record","pid":1,"on":true}`))
	s := &Server{source: &source{}, workingSet: &workingSet{}}
	f.Fuzz(func(t *testing.T, line []byte) {
		x := &exchange{}
		s.control(t.Context(), line, x)
		if x.after != nil && x.response.Error != "" {
			t.Fatal("refused, and done")
		}
		if _, err := json.Marshal(x.response); err != nil {
			t.Fatal(err)
		}
	})
}

// socketpair is a connection within the test.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

func pipeEnd(t testing.TB) int {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return int(r.Fd())
}

func TestReceiveHandshake(t *testing.T) {
	fd := pipeEnd(t)
	long := "[" + strings.Repeat(`{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096},`, 300) +
		`{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]`
	for _, c := range []struct {
		name string
		send func(t *testing.T, c *net.UnixConn)
		fds  int
		want string
	}{
		{"at once", func(t *testing.T, c *net.UnixConn) { send(t, c, firecracker, fd) }, 1, ""},
		{"with a pidfd", func(t *testing.T, c *net.UnixConn) { send(t, c, firecracker, fd, fd) }, 2, ""},
		{"in pieces", func(t *testing.T, c *net.UnixConn) {
			send(t, c, firecracker[:1], fd)
			for _, b := range []byte(firecracker[1:]) {
				send(t, c, string(b))
			}
		}, 1, ""},
		{"descriptor comes last", func(t *testing.T, c *net.UnixConn) {
			send(t, c, firecracker[:100])
			send(t, c, firecracker[100:], fd)
		}, 1, ""},
		{"20 KiB", func(t *testing.T, c *net.UnixConn) { send(t, c, long, fd) }, 1, ""},
		{"no descriptor", func(t *testing.T, c *net.UnixConn) { send(t, c, firecracker) }, 0, "0 descriptors"},
		{"three descriptors", func(t *testing.T, c *net.UnixConn) { send(t, c, firecracker, fd, fd, fd) }, 0, "3 descriptors"},
		{"very many descriptors", func(t *testing.T, c *net.UnixConn) {
			send(t, c, firecracker, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd)
		}, 0, "too many descriptors"},
		{"not an array", func(t *testing.T, c *net.UnixConn) { send(t, c, "GET / HTTP/1.1\r\n", fd) }, 0, "parse handshake"},
		{"ends early", func(t *testing.T, c *net.UnixConn) { send(t, c, firecracker[:50], fd); c.Close() }, 0, "ended after 50 bytes"},
		{"says nothing", func(t *testing.T, c *net.UnixConn) { c.Close() }, 0, "ended after 0 bytes"},
		{"too long", func(t *testing.T, c *net.UnixConn) {
			_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
			send(t, c, "[", fd)
			_, _ = c.Write([]byte(strings.Repeat(" ", maxHandshake)))
		}, 0, "more than 65536 bytes"},
		{"two arrays", func(t *testing.T, c *net.UnixConn) { send(t, c, firecracker+firecracker, fd); c.Close() }, 0, "ended after"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := socketpair(t)
			done := make(chan struct{})
			go func() { defer close(done); c.send(t, a) }()
			h, err := receiveHandshake(b)
			b.Close() // lets a sender go that was not read to the end
			<-done
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("got %v, want %q", err, c.want)
			case c.want == "":
				if len(h.fds) != c.fds {
					t.Errorf("%d descriptors, want %d", len(h.fds), c.fds)
				}
				h.close()
			}
		})
	}
}

func send(t *testing.T, c *net.UnixConn, body string, fds ...int) {
	t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := c.WriteMsgUnix([]byte(body), oob, nil)
	if err == nil && n < len(body) {
		_, err = c.Write([]byte(body[n:]))
	}
	if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
}

func TestHandshakeTimeout(t *testing.T) {
	a, b := socketpair(t)
	send(t, a, "[")
	if err := b.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := receiveHandshake(b); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Fatalf("got %v", err)
	}
}

// A connection that hands over nonsense leaves the server as it was.
func TestRefusedConnections(t *testing.T) {
	f := serve(t, testConfig(t, PolicyCopy))
	fd := pipeEnd(t)
	good := `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]`
	for i, fds := range [][]int{{}, {fd}, {fd, fd}} {
		c := f.dial(t)
		send(t, c, good, fds...)
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("%d: server sent %d bytes", i, n)
		}
	}
	if st := f.Stats(); st.Refused != 3 || len(st.Failures) != 0 {
		t.Errorf("%+v", st)
	}
}

// The second descriptor has to be a pidfd of a process that runs.
func TestPidfdIsChecked(t *testing.T) {
	self := &unix.Ucred{Uid: uint32(os.Geteuid())}
	f := &fixture{Server: &Server{}}
	ended := f.vmm(t, pstest.Config{Shape: pstest.Anonymous})
	endedFD := ended.pidfd(t)
	ended.Kill()
	dup := func(fd int) int {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for want, fd := range map[string]int{"second descriptor is none": dup(pipeEnd(t)), "the VMM has ended": dup(endedFD)} {
		if _, err := newProcess(fd, self); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	runs := f.vmm(t, pstest.Config{Shape: pstest.Anonymous})
	p, err := newProcess(dup(runs.pidfd(t)), self)
	if err != nil || p.pid != runs.PID() {
		t.Fatal(p, err)
	}
	p.close()
	// A user may only name processes of its own: they are killed on its behalf.
	other := &unix.Ucred{Uid: uint32(os.Geteuid()) + 12345}
	if _, err := newProcess(dup(runs.pidfd(t)), other); !errors.Is(err, errNotAllowed) {
		t.Errorf("got %v", err)
	}
}

// A VMM whose mappings are refused has handed its memory over: it is killed.
func TestRefusedMappingsKill(t *testing.T) {
	f := serve(t, testConfig(t, PolicyCopy))
	m := f.clone(t)
	f.sessions(t, 1)
	body := []byte(`[{"base_host_virt_addr":4096,"size":4096,"offset":1073741824,"page_size":4096}]`)
	if err := m.Connect(pstest.Handshake{Socket: f.socket, Body: body}); err != nil {
		t.Fatal(err)
	}
	m.killed(t)
	if fail := f.failure(t); !strings.Contains(fail.Reason, "behind the memory file") {
		t.Errorf("%+v", fail)
	}
	f.sessions(t, 0)
}
