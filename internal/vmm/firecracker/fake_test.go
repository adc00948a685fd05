package firecracker_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"fcvm/internal/pageserver"
	"fcvm/internal/uffd"
)

// envFake makes the test binary a program that does what Firecracker does with a
// snapshot's memory, and nothing else. Its value is where a load fails, if it does.
const envFake = "FCVM_TEST_FIRECRACKER"

// Firecracker maps memory on its main thread, which is the one that is traced.
func init() {
	if _, ok := os.LookupEnv(envFake); ok || programName() == "firecracker" || programName() == "jailer" {
		runtime.LockOSThread()
	}
}

// programName tells a copy of the test binary which program it is: a jailer clears the
// environment.
func programName() string { return filepath.Base(os.Args[0]) }

// fakeSize is how much memory the snapshots have that the fake loads.
const fakeSize = 8 << 20

type fakeVMM struct {
	socket string
	state  string
	mem    []byte
	kept   io.Closer // the connection to the page server
	// main runs on the main thread.
	main chan func()
}

func fakeFirecracker(args []string) {
	if len(args) > 0 && args[0] == "--version" {
		fmt.Println("Firecracker v1.16.1")
		return
	}
	f := &fakeVMM{state: "Not started", main: make(chan func())}
	for i, a := range args {
		if a == "--api-sock" {
			f.socket = args[i+1]
		}
	}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go func() { _ = http.Serve(l, f) }()
	for do := range f.main {
		do()
	}
}

func (f *fakeVMM) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	done := make(chan struct{})
	f.main <- func() {
		defer close(done)
		answer, err := f.serve(r.Method+" "+r.URL.Path, body)
		switch {
		case err != nil:
			b, _ := json.Marshal(map[string]string{"fault_message": err.Error()})
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write(b)
		case answer == "":
			w.WriteHeader(http.StatusNoContent)
		default:
			_, _ = io.WriteString(w, answer)
		}
		if err != nil && r.URL.Path == "/snapshot/load" {
			// As the real one's: the answer is out, and it ends.
			_ = http.NewResponseController(w).Flush()
			fmt.Fprintln(os.Stderr, "RunWithApiError error: Failed to build MicroVM: Loading snapshot failed")
			os.Exit(1)
		}
	}
	<-done
}

func (f *fakeVMM) serve(request string, body []byte) (string, error) {
	switch {
	case request == "GET /version":
		return `{"firecracker_version":"1.16.1"}`, nil
	case request == "GET /":
		return `{"id":"fake","state":"` + f.state + `"}`, nil
	case request == "PATCH /vm":
		f.state = map[bool]string{true: "Paused", false: "Running"}[strings.Contains(string(body), "Paused")]
		return "", nil
	case request == "PUT /snapshot/create":
		var s struct {
			State string `json:"snapshot_path"`
		}
		if err := json.Unmarshal(body, &s); err != nil {
			return "", err
		}
		if err := os.WriteFile(s.State, []byte("state"), 0o600); err != nil {
			return "", err
		}
		return "", errors.New("Create snapshot error: Cannot perform open on the memory backing file: Not a directory (os error 20)")
	case request == "PUT /snapshot/load":
		return "", f.load(body)
	case strings.HasPrefix(request, "GET /page/"):
		n, err := strconv.Atoi(strings.TrimPrefix(request, "GET /page/"))
		if err != nil {
			return "", err
		}
		return fmt.Sprint(f.mem[n*4096]), nil
	case strings.HasPrefix(request, "PUT /page/"):
		n, err := strconv.Atoi(strings.TrimPrefix(request, "PUT /page/"))
		if err != nil {
			return "", err
		}
		f.mem[n*4096] = 0x77
		return "", nil
	}
	return "", fmt.Errorf("invalid request %s", request)
}

func (f *fakeVMM) load(body []byte) error {
	var s struct {
		State  string `json:"snapshot_path"`
		Memory struct {
			Type string `json:"backend_type"`
			Path string `json:"backend_path"`
		} `json:"mem_backend"`
	}
	if err := json.Unmarshal(body, &s); err != nil {
		return err
	}
	failing := os.Getenv(envFake)
	if failing == "before" {
		return errors.New("Load snapshot error: Failed to restore from snapshot: Invalid snapshot state: No memory region defined.")
	}
	if failing == "death" {
		fmt.Fprintln(os.Stderr, "the fake's last words")
		os.Exit(1)
	}
	var err error
	if s.Memory.Type == "Uffd" {
		err = f.handshake(s.Memory.Path)
	} else {
		err = f.mapFile(s.Memory.Path)
	}
	if err != nil {
		return err
	}
	// Firecracker reads the devices' queues in the guest's memory before it answers.
	if f.mem[4096] == 0 && f.mem[2*4096] == 0 {
		return errors.New("Load snapshot error: the memory is empty")
	}
	if failing == "after" {
		return errors.New("Load snapshot error: Failed to restore from snapshot: Failed to build microVM from snapshot: no device")
	}
	f.state = "Paused"
	return nil
}

func (f *fakeVMM) mapFile(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return f.mmap(unix.MAP_PRIVATE|unix.MAP_NORESERVE, file.Fd())
}

func (f *fakeVMM) mmap(flags int, fd uintptr) error {
	p, _, errno := unix.Syscall6(unix.SYS_MMAP, 0, fakeSize, unix.PROT_READ|unix.PROT_WRITE, uintptr(flags), fd, 0)
	if errno != 0 {
		return errno
	}
	f.mem = unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&p))), fakeSize)
	return nil
}

// handshake is Firecracker's own.
func (f *fakeVMM) handshake(socket string) error {
	if err := f.mmap(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, ^uintptr(0)); err != nil {
		return err
	}
	fd, err := uffd.Open()
	if err != nil {
		return err
	}
	if _, err := fd.API(uffd.FeatureEventRemove); err != nil {
		return err
	}
	addr := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(f.mem))))
	if _, err := fd.Register(addr, fakeSize, uffd.ModeMissing); err != nil {
		return err
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	f.kept = conn
	return fd.Use(func(n int) error {
		return pageserver.SendHandshake(conn.(*net.UnixConn), n, -1, []pageserver.Mapping{{Addr: addr, Size: fakeSize}})
	})
}

// askFake reads or changes a page of the memory that the fake in dir has.
func askFake(dir, method string, page int) (string, error) {
	c := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(dir, "api.sock"))
		},
	}}
	req, err := http.NewRequest(method, "http://localhost/page/"+strconv.Itoa(page), nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}
