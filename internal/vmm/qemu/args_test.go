package qemu

import (
	"slices"
	"strings"
	"testing"

	"fcvm/internal/vmm"
)

func testMachine() machine {
	return machine{
		Place:   vmm.Place{ID: "a,b", Dir: "/data/vms/a,b", Runtime: "/run/fcvm/x"},
		Machine: vmm.Machine{MemoryBytes: 256 << 20, CPUs: 2, RootFS: "/data/images/x/root,fs.erofs"},
		accel:   tcg,
		cpu:     "max",
		qmpFD:   3,
		agentFD: 4,
	}
}

// options returns the values of an option, in order.
func options(args []string, name string) []string {
	var v []string
	for i, a := range args {
		if a == name {
			v = append(v, args[i+1])
		}
	}
	return v
}

// The device state names devices by their position on the bus: a clone must
// have the same ones in the same order, and memory of the same name.
func TestGuestSeesTheSameMachineInAClone(t *testing.T) {
	golden := testMachine()
	golden.kernel, golden.initrd, golden.cmdline = "/k", "/i", "quiet"
	clone := testMachine()
	clone.ID, clone.Dir = "c", "/data/vms/c"
	clone.qmpFD, clone.agentFD, clone.stateFD = 5, 6, 7
	clone.ports = []vmm.Port{{HostPort: 8080, GuestPort: 80, Proto: "tcp"}}
	ahead := clone
	ahead.paused = true
	byFile := clone
	byFile.memFD = 8
	want, err := golden.args()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]machine{"attached": clone, "ahead": ahead, "by file": byFile} {
		got, err := m.args()
		if err != nil {
			t.Fatal(err)
		}
		for _, opt := range []string{"-machine", "-accel", "-cpu", "-smp", "-m", "-device", "-global", "-serial"} {
			if g, w := options(got, opt), options(want, opt); !slices.Equal(g, w) || len(g) == 0 {
				t.Errorf("%s: %s %q, want %q", name, opt, g, w)
			}
		}
		if len(options(got, "-kernel")) > 0 {
			t.Errorf("%s: a clone reads a kernel", name)
		}
		if slices.Contains(got, "-S") != m.paused {
			t.Errorf("%s: %q", name, got)
		}
		if in := options(got, "-incoming"); !slices.Equal(in, []string{"fd:7"}) {
			t.Errorf("%s: -incoming %q", name, in)
		}
	}
	if len(options(want, "-incoming")) > 0 {
		t.Error("a golden VM waits for state")
	}
}

// The kernel may merge the guest's memory with that of others only when that was
// asked for, which QEMU itself would do.
func TestMemoryIsNotMerged(t *testing.T) {
	for _, want := range []string{"off", "on"} {
		m := testMachine()
		m.merge = want == "on"
		args, err := m.args()
		if err != nil {
			t.Fatal(err)
		}
		if o := options(args, "-machine"); len(o) != 1 || !strings.HasSuffix(o[0], ",mem-merge="+want) {
			t.Errorf("machine %q, want mem-merge=%s", o, want)
		}
	}
}

func TestQEMUIsSandboxed(t *testing.T) {
	args, err := testMachine().args()
	if err != nil {
		t.Fatal(err)
	}
	if s := options(args, "-sandbox"); len(s) != 1 || !strings.HasPrefix(s[0], "on,") || !strings.Contains(s[0], "spawn=deny") {
		t.Errorf("-sandbox %q", s)
	}
	for _, a := range []string{"-nodefaults", "-no-user-config", "-no-reboot"} {
		if !slices.Contains(args, a) {
			t.Errorf("no %s", a)
		}
	}
}

// A comma in a path must not begin an option of its own.
func TestPathsAreEscaped(t *testing.T) {
	args, err := testMachine().args()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, c := range options(args, "-chardev") {
		if strings.Contains(c, "/data/vms/") {
			found++
			if !strings.Contains(c, "path=/data/vms/a,,b/") {
				t.Errorf("-chardev %s", c)
			}
		}
	}
	if found != 2 {
		t.Errorf("%d character devices write files, want 2", found)
	}
	if n := options(args, "-name"); !slices.Equal(n, []string{"guest=fcvm-a,,b"}) {
		t.Errorf("-name %q", n)
	}
	if b := options(args, "-blockdev"); len(b) != 1 || !strings.Contains(b[0], `"/data/images/x/root,fs.erofs"`) {
		t.Errorf("-blockdev %q", b)
	}
}

func TestForward(t *testing.T) {
	for _, c := range []struct {
		port vmm.Port
		want string // or, when it begins with "!", in the error
	}{
		{vmm.Port{HostPort: 8080, GuestPort: 80, Proto: "tcp"}, "tcp::8080-:80"},
		{vmm.Port{HostIP: "127.0.0.1", HostPort: 53, GuestPort: 53, Proto: "udp"}, "udp:127.0.0.1:53-:53"},
		{vmm.Port{HostIP: "::ffff:10.0.0.1", HostPort: 1, GuestPort: 65535, Proto: "tcp"}, "tcp:10.0.0.1:1-:65535"},
		{vmm.Port{HostIP: "::1", HostPort: 1, GuestPort: 1, Proto: "tcp"}, "!IPv4"},
		{vmm.Port{HostIP: "127.0.0.1,id=x", HostPort: 1, GuestPort: 1, Proto: "tcp"}, "!address"},
		{vmm.Port{HostPort: 0, GuestPort: 1, Proto: "tcp"}, "!1 to 65535"},
		{vmm.Port{HostPort: 1, GuestPort: 65536, Proto: "tcp"}, "!1 to 65535"},
		{vmm.Port{HostPort: 1, GuestPort: 1, Proto: "TCP"}, "!protocol"},
	} {
		got, err := forward(c.port)
		if wantErr, ok := strings.CutPrefix(c.want, "!"); ok {
			if err == nil || !strings.Contains(err.Error(), wantErr) {
				t.Errorf("%+v: %q, error %v, want one about %q", c.port, got, err, wantErr)
			}
		} else if err != nil || got != c.want {
			t.Errorf("%+v: %q, error %v, want %q", c.port, got, err, c.want)
		}
	}
}
