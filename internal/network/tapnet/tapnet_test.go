//go:build linux

package tapnet_test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"fcvm/internal/network"
	"fcvm/internal/network/netmain"
	"fcvm/internal/network/netstack"
	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
	"fcvm/internal/vmm/process"
)

const fakeVMM = "fake-vmm"

func TestMain(m *testing.M) {
	netmain.Intercept()
	if len(os.Args) == 2 && os.Args[1] == fakeVMM {
		if err := runVMM(); err != nil {
			fmt.Println("fake VMM:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runVMM opens the TAP by its name, as VMMs do, and is its own guest, which echoes on
// TCP port 80 until stdin ends.
func runVMM() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(tapnet.Device)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("open TAP: %w", err)
	}
	ep, err := fdbased.New(&fdbased.Options{FDs: []int{fd}, MTU: netstack.MTU, EthernetHeader: true, Address: "\x52\x54\x00\x12\x34\x56", RXChecksumOffload: true})
	if err != nil {
		return err
	}
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := s.CreateNIC(1, ep); err != nil {
		return errors.New(err.String())
	}
	addr := tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(netstack.Guest.As4()), PrefixLen: 24}
	if err := s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: addr}, stack.AddressProperties{}); err != nil {
		return errors.New(err.String())
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
	l, err := gonet.ListenTCP(s, tcpip.FullAddress{Port: 80}, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	// Port 81 tells whether the host's port that it is told can be reached as 10.0.2.2.
	l81, err := gonet.ListenTCP(s, tcpip.FullAddress{Port: 81}, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l81.Accept()
			if err != nil {
				return
			}
			var port uint16
			if err := binary.Read(c, binary.BigEndian, &port); err == nil {
				var out net.Conn
				out, err = gonet.DialTCP(s, tcpip.FullAddress{Addr: tcpip.AddrFrom4(netstack.Gateway.As4()), Port: port}, ipv4.ProtocolNumber)
				if err == nil {
					out.Close()
				}
				fmt.Fprint(c, err)
			}
			c.Close()
		}
	}()
	links, err := net.Interfaces()
	if err != nil {
		return err
	}
	var names []string
	for _, i := range links {
		names = append(names, i.Name)
	}
	fmt.Println("ready", strings.Join(names, " "))
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// machine is a fake VMM with its network.
type machine struct {
	net   *tapnet.Network
	proc  *process.Process
	stdin io.Closer
	dir   string
	links string // that the VMM saw
}

// start starts one, or skips the test where there are no namespaces or TAPs.
func start(t *testing.T) *machine { t.Helper(); return startOn(t, vmm.NetworkTAP) }

func startOn(t *testing.T, kind vmm.Network) *machine {
	t.Helper()
	if err := tapnet.Usable(); err != nil {
		t.Skip("no TAPs here:", err)
	}
	m := &machine{dir: t.TempDir()}
	log, err := os.Create(filepath.Join(m.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	t.Cleanup(func() {
		if b, _ := os.ReadFile(log.Name()); len(b) > 0 {
			t.Logf("log of the network and the VMM:\n%s", b)
		}
	})
	if m.net, err = tapnet.Start(t.Context(), m.dir, kind, log); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", fakeVMM)
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if m.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	link := m.net.Wrap(cmd, false)
	err = cmd.Start()
	link.Close()
	if errors.Is(err, syscall.EPERM) {
		m.net.End()
		t.Skip("no network namespaces for this user:", err)
	}
	if err == nil {
		m.proc, err = process.Started(cmd)
	}
	if err != nil {
		m.net.End()
		t.Fatal(err)
	}
	m.net.Follow(m.proc)
	t.Cleanup(m.end)
	line, err := bufio.NewReader(out).ReadString('\n')
	links, ok := strings.CutPrefix(strings.TrimSpace(line), "ready ")
	if err != nil || !ok {
		t.Fatalf("the VMM says %q: %v", line, err)
	}
	m.links = links
	return m
}

func (m *machine) end() {
	_ = m.proc.Kill()
	<-m.net.Done()
	m.net.Release()
	_ = m.proc.Release()
}

// claim finds a free port for the guest's port 80.
func claim(t *testing.T) []vmm.Port {
	t.Helper()
	var c network.Claims
	ports, err := c.Claim(t.Context(), "x", []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80, Proto: "tcp"}})
	if err != nil {
		t.Fatal(err)
	}
	return ports
}

func publish(t *testing.T, n *tapnet.Network) vmm.Port {
	t.Helper()
	ports := claim(t)
	if err := n.Publish(t.Context(), ports); err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

func echo(t *testing.T, p vmm.Port, size int) {
	t.Helper()
	c, err := net.Dial("tcp4", network.HostAddr(p))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	data := make([]byte, size)
	_, _ = rand.Read(data)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d of %d bytes came back: %v", len(got), size, err)
	}
}

// All VMs have the same device and the same address, each in a namespace of its own.
func TestMachinesAreAlikeAndApart(t *testing.T) {
	a, b := start(t), start(t)
	for _, m := range []*machine{a, b} {
		if m.links != "lo "+tapnet.Device {
			t.Errorf("a VMM sees the interfaces %q", m.links)
		}
		echo(t, publish(t, m.net), 2<<20)
	}
	if _, err := net.InterfaceByName(tapnet.Device); err == nil {
		t.Errorf("%s is on the host", tapnet.Device)
	}
}

// The network ends with the VMM, whatever ended that, and its ports are free then.
func TestEndsWithVMM(t *testing.T) {
	for name, end := range map[string]func(*machine) error{
		"killed":    func(m *machine) error { return m.proc.Kill() },
		"by itself": func(m *machine) error { return m.stdin.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			m := start(t)
			p := publish(t, m.net)
			if err := end(m); err != nil {
				t.Fatal(err)
			}
			<-m.net.Done()
			l, err := net.Listen("tcp4", network.HostAddr(p))
			if err != nil {
				t.Fatal(err)
			}
			l.Close()
		})
	}
}

// Nobody has to be there to end it: it holds a pidfd of the VMM.
func TestEndsWithoutSupervisor(t *testing.T) {
	m := start(t)
	m.net.Release()
	h := m.net.Handle()
	p, err := process.Adopt(h.PID, h.StartTime)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Release() }()
	if err := m.proc.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	// For the clean-up, which waits for what Follow does.
	if m.net, err = tapnet.Adopt(h, m.dir); err != nil {
		t.Fatal(err)
	}
	m.net.Follow(m.proc)
}

func TestAdopt(t *testing.T) {
	m := start(t)
	before := publish(t, m.net)
	m.net.Release()
	var err error
	if m.net, err = tapnet.Adopt(m.net.Handle(), m.dir); err != nil {
		t.Fatal(err)
	}
	m.net.Follow(m.proc)
	echo(t, before, 1000)
	echo(t, publish(t, m.net), 1000)
}

// Only who asks for it reaches the host's loopback.
func TestHostLoopback(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for kind, want := range map[vmm.Network]string{vmm.NetworkTAP: "connection was refused", vmm.NetworkTAPHost: "<nil>"} {
		m := startOn(t, kind)
		ports := claim(t)
		ports[0].GuestPort = 81
		if err := m.net.Publish(t.Context(), ports); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp4", network.HostAddr(ports[0]))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		if err := binary.Write(c, binary.BigEndian, uint16(l.Addr().(*net.TCPAddr).Port)); err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(c)
		c.Close()
		if err != nil || !strings.Contains(string(said), want) {
			t.Errorf("%s: the guest connects to the host's loopback: %q, %v; want %q", kind, said, err, want)
		}
	}
}

func TestPublishTaken(t *testing.T) {
	m := start(t)
	p := publish(t, m.net)
	free := claim(t)
	err := m.net.Publish(t.Context(), append(free, p))
	if !errors.Is(err, network.ErrTaken) || !strings.Contains(err.Error(), network.HostAddr(p)) {
		t.Errorf("publish a port twice: %v", err)
	}
	if err := m.net.Publish(t.Context(), free); err != nil {
		t.Errorf("publish what was free, after that: %v", err)
	}
}

// A network that dies takes its connections with it, and not the VM.
func TestNetworkDies(t *testing.T) {
	m := start(t)
	publish(t, m.net)
	h := m.net.Handle()
	p, err := process.Adopt(h.PID, h.StartTime)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Release() }()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := m.net.Publish(t.Context(), claim(t)); err == nil {
		t.Error("a network that has ended publishes ports")
	}
	select {
	case <-m.proc.Done():
		t.Error("the VMM ended with it")
	default:
	}
	m.net.Release()
	if m.net, err = tapnet.Adopt(h, m.dir); err != nil {
		t.Fatal("adopt a VM whose network has ended:", err)
	}
	m.net.Follow(m.proc)
}

// Where the VMM is never started, its network ends, too.
func TestEndsWithoutVMM(t *testing.T) {
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	n, err := tapnet.Start(t.Context(), t.TempDir(), vmm.NetworkTAP, log)
	if err != nil {
		t.Fatal(err)
	}
	h := n.Handle()
	p, err := process.Adopt(h.PID, h.StartTime)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Release() }()
	cmd := exec.Command("/nonexistent")
	n.Wrap(cmd, false).Close()
	<-p.Done()
	n.End()
	if b, err := os.ReadFile(log.Name()); err != nil || len(b) > 0 {
		t.Errorf("it complains: %s%v", b, err)
	}
}
