package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fcvm/internal/guest"
	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/proto"
)

// patience bounds every wait for the guest: without KVM, and on a machine that
// compiles meanwhile, a boot takes many seconds.
const patience = 2 * time.Minute

// vm is a guest under QEMU, started as simply as it can be: internal/vmm/qemu
// has its own tests.
type vm struct {
	dir    string
	client *agent.Client
	ended  chan struct{}
}

func patient(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed here", tool)
		}
	}
}

func output(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// assets uses a kernel that an earlier run or `make` left: FCVM_TEST_GUEST, or
// the user's cache, which internal/vmm/vmmtest fills.
func assets(t *testing.T, initBinary string) *guest.Assets {
	t.Helper()
	dir := os.Getenv("FCVM_TEST_GUEST")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Skipf("no place for the guest's kernel: %v; set FCVM_TEST_GUEST", err)
		}
		dir = filepath.Join(cache, "fcvm-test", "guest")
	}
	_, notThere := guest.Open(dir)
	a, err := guest.Setup(patient(t), guest.SetupOptions{Dir: dir, InitBinary: initBinary})
	if err != nil && notThere != nil {
		t.Skipf("no guest kernel, and none can be had: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func boot(t *testing.T) *vm {
	t.Helper()
	if testing.Short() {
		t.Skip("a real guest takes longer than -short allows")
	}
	need(t, "qemu-system-x86_64", "mkfs.erofs", "go")
	dir, err := os.MkdirTemp("", "bt") // short, for the sake of the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin := filepath.Join(dir, "bin")
	output(t, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin+"/", "fcvm/cmd/fcvm-init", "fcvm/internal/guest/guesttest/tool")
	a := assets(t, filepath.Join(bin, "fcvm-init"))

	root := filepath.Join(dir, "root")
	for path, content := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/tool\nweb:x:33:34:web:/srv:/tool\n",
		"etc/group":  "root:x:0:\nweb:x:34:\nextra:x:44:web\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(filepath.Join(bin, "tool"), filepath.Join(root, "tool")); err != nil {
		t.Fatal(err)
	}
	output(t, "mkfs.erofs", "--all-root", filepath.Join(dir, "root.erofs"), root)

	v := &vm{dir: dir, ended: make(chan struct{})}
	v.start(t, a)
	conn, err := dialSocket(patient(t), v.path("agent.sock"))
	if err != nil {
		t.Fatalf("%v\n%s", err, v.console())
	}
	if v.client, err = agent.Connect(patient(t), conn); err != nil {
		t.Fatalf("%v\n%s", err, v.console())
	}
	t.Cleanup(func() { v.client.Close() })
	return v
}

// identify does what a clone's host does: it comes to a guest that was quiesced.
func (v *vm) identify(t *testing.T, id proto.Identity) error {
	if err := v.client.Quiesce(patient(t)); err != nil {
		return err
	}
	v.client.Close()
	conn, err := dialSocket(patient(t), v.path("agent.sock"))
	if err != nil {
		return err
	}
	v.client = agent.New(conn) // closed at the end of the whole test
	return v.client.Identify(patient(t), id)
}

func (v *vm) path(name string) string { return filepath.Join(v.dir, name) }

func (v *vm) console() string {
	b, _ := os.ReadFile(v.path("console.log")) // for a message
	return string(b)
}

func (v *vm) start(t *testing.T, a *guest.Assets) {
	t.Helper()
	cmd := exec.Command("qemu-system-x86_64",
		"-M", "microvm,accel=tcg,memory-backend=ram", "-object", "memory-backend-ram,id=ram,size=192M", "-m", "192M",
		"-cpu", "max", "-smp", "1", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-kernel", a.Kernel, "-initrd", a.Initrd,
		"-append", strings.Join([]string{"console=ttyS0", hostTSC(), guest.Cmdline, guest.UserNetwork().Cmdline()}, " "),
		"-global", "virtio-mmio.force-legacy=false",
		"-device", "virtio-serial-device",
		"-chardev", "socket,id=a,server=on,wait=off,path="+v.path("agent.sock"), "-device", "virtserialport,chardev=a,name=fcvm.agent",
		"-chardev", "file,id=l,path="+v.path("container.log"), "-device", "virtserialport,chardev=l,name=fcvm.log",
		"-drive", "if=none,id=d,format=raw,readonly=on,file="+v.path("root.erofs"), "-device", "virtio-blk-device,drive=d",
		"-device", "virtio-rng-device", "-device", "virtio-balloon-device,free-page-reporting=on",
		"-serial", "file:"+v.path("console.log"), "-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.ended)
		_ = cmd.Wait() // how it ends is for the test to judge
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-v.ended
		if t.Failed() {
			t.Logf("QEMU said: %s\nconsole: %s", said.String(), v.console())
		}
	})
}

// hostTSC spares the guest the calibration of its clock, in which a guest
// without KVM may hang.
func hostTSC() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if k, mhz, ok := strings.Cut(line, ":"); ok && strings.HasPrefix(k, "cpu MHz") {
			return "tsc_early_khz=" + strings.ReplaceAll(strings.TrimSpace(mhz), ".", "")
		}
	}
	return ""
}

func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	for {
		conn, err := net.Dial("unix", path)
		if err == nil || ctx.Err() != nil {
			return conn, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

type result struct {
	stdout, stderr string
	code           int
}

func (v *vm) exec(t *testing.T, req proto.ExecRequest) result {
	t.Helper()
	s, err := v.client.Exec(patient(t), req)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return read(t, s)
}

func (v *vm) tool(t *testing.T, args ...string) result {
	t.Helper()
	return v.exec(t, proto.ExecRequest{Args: append([]string{"/tool"}, args...)})
}

func read(t *testing.T, s io.Reader) (r result) {
	t.Helper()
	for {
		f, err := proto.ReadFrame(s, nil)
		if err != nil {
			t.Fatalf("%v (so far %+v)", err, r)
		}
		switch f.Type {
		case proto.FrameStdout:
			r.stdout += string(f.Payload)
		case proto.FrameStderr:
			r.stderr += string(f.Payload)
		case proto.FrameExit:
			if r.code, err = f.ExitCode(); err != nil {
				t.Fatal(err)
			}
			return r
		}
	}
}

func TestBoot(t *testing.T) {
	v := boot(t)
	attached, err := v.client.Attach(patient(t), proto.AttachRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()
	spec := proto.ContainerSpec{
		Args: []string{"/tool", "main"}, Hostname: "golden", WorkDir: "/made/here",
		User: "web", Env: []string{"PATH=/"}, ExtraHosts: []string{"db:10.9.8.7"},
	}
	var e *agent.Error
	if err := v.client.Start(patient(t), proto.ContainerSpec{Args: []string{"no-such-program"}}); !errors.As(err, &e) || e.Code != 127 {
		t.Fatalf("Start of what is not there = %v, want code 127", err)
	}
	if err := v.client.Start(patient(t), spec); err != nil {
		t.Fatal(err)
	}
	info, err := v.client.Info(patient(t))
	if err != nil || !info.ContainerRunning || info.Hostname != "golden" || info.BootID == "" {
		t.Errorf("Info = %+v, %v", info, err)
	}
	t.Logf("the agent answered %v after the guest's start", info.Uptime)

	for name, c := range map[string]struct {
		req  proto.ExecRequest
		want result
	}{
		"the container's user": {proto.ExecRequest{Args: []string{"/tool", "who"}}, result{"33 34 [34 44] /srv /made/here\n", "", 0}},
		"root":                 {proto.ExecRequest{Args: []string{"/tool", "who"}, User: "0", WorkDir: "/"}, result{"0 0 [0] /root /\n", "", 0}},
		"user and group":       {proto.ExecRequest{Args: []string{"/tool", "who"}, User: "7:44"}, result{"7 44 [44] / /made/here\n", "", 0}},
		"in PATH":              {proto.ExecRequest{Args: []string{"tool", "exit", "3"}}, result{"", "exit with 3\n", 3}},
		"terminal":             {proto.ExecRequest{Args: []string{"/tool", "size"}, TTY: true, Rows: 12, Cols: 34}, result{"12 34\r\n", "", 0}},
		"network":              {proto.ExecRequest{Args: []string{"/tool", "loopback"}}, result{"[127.0.0.1/8 10.0.2.15/24 ::1/128]\n", "", 0}},
		"open files":           {proto.ExecRequest{Args: []string{"/tool", "limit"}}, result{"524288\n", "", 0}},
		"low ports":            {proto.ExecRequest{Args: []string{"/tool", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"}}, result{"0\n", "", 0}},
		"resolver":             {proto.ExecRequest{Args: []string{"/tool", "cat", "/etc/resolv.conf"}}, result{"nameserver 10.0.2.3\n", "", 0}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := v.exec(t, c.req); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
	t.Run("hosts", func(t *testing.T) {
		got := v.tool(t, "cat", "/etc/hosts").stdout
		if !strings.Contains(got, "10.9.8.7\tdb\n") || !strings.Contains(got, "10.0.2.15\tgolden\n") {
			t.Errorf("hosts = %q", got)
		}
	})
	t.Run("clock", func(t *testing.T) {
		// Without a real clock an idle guest ticks on for ever.
		got := v.tool(t, "cat", "/sys/devices/system/clocksource/clocksource0/current_clocksource")
		if got.code != 0 || strings.Contains(got.stdout, "jiffies") {
			t.Errorf("clock source: %+v", got)
		}
	})
	t.Run("zombies", func(t *testing.T) {
		v.tool(t, "orphan")
		if got := v.tool(t, "zombies"); got.code != 0 {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("copy", func(t *testing.T) { testCopy(t, v) })
	t.Run("identity", func(t *testing.T) { testIdentity(t, v) })
	t.Run("reconnect", func(t *testing.T) { testReconnect(t, v) })

	if err := v.client.Signal(patient(t), "TERM"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.ended:
	case <-time.After(patience):
		t.Fatal("the VM did not end with its container")
	}
	testLog(t, v)
}

func testCopy(t *testing.T, v *vm) {
	var in bytes.Buffer
	w := tar.NewWriter(&in)
	content := strings.Repeat("some content\n", 10_000)
	if err := w.WriteHeader(&tar.Header{Name: "f", Mode: 0o640, Size: int64(len(content)), Uid: 33, Gid: 44}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := v.client.CopyIn(patient(t), "/made/copy", &in); err != nil {
		t.Fatal(err)
	}
	out, err := v.client.CopyOut(patient(t), "/made/copy")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	r := tar.NewReader(out)
	h, err := r.Next()
	if err != nil || h.Name != "copy" || h.Mode != 0o640 || h.Uid != 33 || h.Gid != 44 {
		t.Fatalf("got %+v, %v", h, err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != content {
		t.Errorf("%d bytes came back of %d, %v", len(b), len(content), err)
	}
}

func testIdentity(t *testing.T, v *vm) {
	wall := time.Unix(2_000_000_000, 0)
	machineID := strings.Repeat("c0ffee12", 4)
	id := proto.Identity{Hostname: "web-1", MachineID: machineID, Entropy: bytes.Repeat([]byte{1, 2, 3, 4}, 16), Wall: wall}
	if err := v.identify(t, id); err != nil {
		t.Fatal(err)
	}
	var host, random string
	var unix int64
	if _, err := fmt.Sscan(v.tool(t, "identity").stdout, &host, &unix, &random); err != nil {
		t.Fatal(err)
	}
	if host != "web-1" || unix < wall.Unix() || unix > wall.Add(patience).Unix() {
		t.Errorf("host name %s, clock %d", host, unix)
	}
	if got := v.tool(t, "cat", "/etc/machine-id", "/etc/hostname").stdout; got != machineID+"\nweb-1\n" {
		t.Errorf("got %q", got)
	}
}

// testReconnect is a supervisor that is killed while a process runs, in the
// middle of a frame.
func testReconnect(t *testing.T, v *vm) {
	s, err := v.client.Exec(patient(t), proto.ExecRequest{Args: []string{"/tool", "cat"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := v.client.Quiesce(patient(t)); err != nil {
		t.Fatal(err)
	}
	v.client.Close()
	conn, err := dialSocket(patient(t), v.path("agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("\xfcLNK\x03\x00\x7f\xf4\x00\x00\x00\x00torn")); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if conn, err = dialSocket(patient(t), v.path("agent.sock")); err != nil {
		t.Fatal(err)
	}
	c, err := agent.Connect(patient(t), conn)
	if err != nil {
		t.Fatal(err)
	}
	v.client = c // closed at the end of the whole test
	if got := v.tool(t, "exit", "5"); got.code != 5 {
		t.Errorf("got %+v", got)
	}
}

// testLog reads what the VM's death must not lose.
func testLog(t *testing.T, v *vm) {
	f, err := os.Open(v.path("container.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got result
	ended := false
	for lr := proto.NewLogReader(f); ; {
		rec, err := lr.Next()
		if err != nil {
			break
		}
		switch rec.Stream {
		case proto.Stdout:
			got.stdout += string(rec.Data)
		case proto.Stderr:
			got.stderr += string(rec.Data)
		case proto.Exit:
			got.code, ended = rec.ExitCode, true
		}
	}
	if want := (result{"main is true\n", "terminated\n", 23}); got != want || !ended {
		t.Errorf("log has %+v (ended: %v), want %+v", got, ended, want)
	}
}
