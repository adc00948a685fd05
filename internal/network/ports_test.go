package network

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fcvm/internal/vmm"
)

func TestParsePorts(t *testing.T) {
	for _, tt := range []struct {
		spec string
		want []vmm.Port
	}{
		{"80", []vmm.Port{{GuestPort: 80, Proto: "tcp"}}},
		{"8080:80", []vmm.Port{{HostPort: 8080, GuestPort: 80, Proto: "tcp"}}},
		{"53:53/udp", []vmm.Port{{HostPort: 53, GuestPort: 53, Proto: "udp"}}},
		{"127.0.0.1:8080:80", []vmm.Port{{HostIP: "127.0.0.1", HostPort: 8080, GuestPort: 80, Proto: "tcp"}}},
		{"127.0.0.1::80", []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}}},
		{"[::1]:8080:80", []vmm.Port{{HostIP: "::1", HostPort: 8080, GuestPort: 80, Proto: "tcp"}}},
		{"8000-8001:80-81", []vmm.Port{
			{HostPort: 8000, GuestPort: 80, Proto: "tcp"}, {HostPort: 8001, GuestPort: 81, Proto: "tcp"},
		}},
	} {
		got, err := ParsePorts(tt.spec)
		if err != nil {
			t.Errorf("ParsePorts(%q): %v", tt.spec, err)
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("ParsePorts(%q): %s", tt.spec, d)
		}
	}
	for _, spec := range []string{
		"", "x", "99999:80", "80:99999", "80:0", "1:2:3:4", "300.1.1.1:1:1", "80/sctp", "8000-8005:80", "-1:80",
		"1-1000:1-1000", "8000-8001:80-82", "host:80:80", ":", "80:",
	} {
		if got, err := ParsePorts(spec); err == nil {
			t.Errorf("ParsePorts(%q) = %v, want an error", spec, got)
		} else if !strings.Contains(err.Error(), spec) {
			t.Errorf("ParsePorts(%q): error does not name it: %v", spec, err)
		}
	}
}

func FuzzParsePorts(f *testing.F) {
	f.Add("127.0.0.1:8000-8001:80-81/udp")
	f.Add("[::1]::80")
	f.Fuzz(func(t *testing.T, spec string) {
		ports, err := ParsePorts(spec)
		if err == nil && (len(ports) == 0 || Check(ports) != nil) {
			t.Errorf("ParsePorts(%q) = %v, which Check refuses", spec, ports)
		}
	})
}

func TestCheckRefusesOverlaps(t *testing.T) {
	p := func(ip string, host int, proto string) vmm.Port {
		return vmm.Port{HostIP: ip, HostPort: host, GuestPort: 1, Proto: proto}
	}
	for _, tt := range []struct {
		a, b vmm.Port
		ok   bool
	}{
		{p("", 80, "tcp"), p("", 80, "tcp"), false},
		{p("", 80, "tcp"), p("127.0.0.1", 80, "tcp"), false},
		{p("0.0.0.0", 80, "tcp"), p("127.0.0.1", 80, "tcp"), false},
		{p("::", 80, "tcp"), p("::1", 80, "tcp"), false},
		{p("127.0.0.2", 80, "tcp"), p("127.0.0.1", 80, "tcp"), true},
		{p("", 80, "tcp"), p("", 80, "udp"), true},
		{p("", 80, "tcp"), p("", 81, "tcp"), true},
		{p("", 0, "tcp"), p("", 0, "tcp"), true},
	} {
		if err := Check([]vmm.Port{tt.a, tt.b}); (err == nil) != tt.ok {
			t.Errorf("Check(%v, %v) = %v", tt.a, tt.b, err)
		}
	}
}

func TestShift(t *testing.T) {
	in := []vmm.Port{{HostPort: 8080, GuestPort: 80, Proto: "tcp"}, {GuestPort: 81, Proto: "tcp"}}
	got, err := Shift(in, 2)
	if err != nil || got[0].HostPort != 8082 || got[1].HostPort != 0 || in[0].HostPort != 8080 {
		t.Errorf("Shift = %v, %v; the input is now %v", got, err, in)
	}
	if _, err := Shift([]vmm.Port{{HostPort: 65535, GuestPort: 80, Proto: "tcp"}}, 1); err == nil {
		t.Error("a port over 65535 was accepted")
	}
}

func TestClaims(t *testing.T) {
	ctx := context.Background()
	var c Claims
	any := []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}, {HostIP: "127.0.0.1", GuestPort: 53, Proto: "udp"}}
	got, err := c.Claim(ctx, "a", any)
	if err != nil {
		t.Fatal(err)
	}
	if got[0].HostPort == 0 || got[1].HostPort == 0 {
		t.Fatalf("no port chosen: %v", got)
	}
	_, err = c.Claim(ctx, "b", got[:1])
	if !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "VM a has it") {
		t.Errorf("claim of a held port: %v", err)
	}
	c.Release("a")
	c.Release("a")
	if _, err = c.Claim(ctx, "b", got); err != nil {
		t.Errorf("claim of a released port: %v", err)
	}
}

func TestClaimNamesForeignListener(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	var c Claims
	for _, ip := range []string{"127.0.0.1", ""} {
		_, err = c.Claim(context.Background(), "a", []vmm.Port{
			{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"},
			{HostIP: ip, HostPort: port, GuestPort: 80, Proto: "tcp"},
		})
		if !errors.Is(err, ErrTaken) {
			t.Errorf("claim %q of a port that is listened on: %v", ip, err)
		}
	}
	if len(c.held) != 0 {
		t.Errorf("a failed claim holds %v", c.held)
	}
}
