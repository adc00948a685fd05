package vmmtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"fcvm/internal/guest"
	"fcvm/internal/guest/agent"
	"fcvm/internal/guest/proto"
	"fcvm/internal/procmem"
	"fcvm/internal/testreport"
	"fcvm/internal/vmm"
)

// started is a VM that a test has started.
type started struct {
	vmm.VM
	place vmm.Place
	port  int // on the host, of the probe's, TCP and UDP; 0 where the agent is asked to ask it
}

// snapshot is a VM as it was.
type snapshot struct {
	mem, state string
	bootID     string
	count      int // the probe's, when the snapshot was taken
}

// freePort finds one that is free for TCP and UDP at the moment. It is 0 for an
// engine without a network.
func (l *lab) freePort(t testing.TB) int {
	t.Helper()
	if l.noNetwork {
		return 0
	}
	for range 20 {
		tcp, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := tcp.Addr().(*net.TCPAddr).Port
		u, err := net.ListenPacket("udp4", "127.0.0.1:"+strconv.Itoa(port))
		_ = tcp.Close()
		if err == nil {
			_ = u.Close()
			return port
		}
	}
	t.Fatal("no port is free for both TCP and UDP")
	return 0
}

func published(port int) []vmm.Port {
	if port == 0 {
		return nil
	}
	return []vmm.Port{
		{HostIP: "127.0.0.1", HostPort: port, GuestPort: 80, Proto: "tcp"},
		{HostIP: "127.0.0.1", HostPort: port, GuestPort: 80, Proto: "udp"},
	}
}

func (l *lab) bootConfig(p vmm.Place, ports []vmm.Port) vmm.BootConfig {
	return vmm.BootConfig{
		Place:   p,
		Machine: l.machine,
		Ports:   ports,
		Kernel:  l.assets.Kernel,
		Initrd:  l.assets.Initrd,
		Cmdline: guest.Cmdline + " " + guest.UserNetwork().Cmdline(),
	}
}

// owned makes sure that v ends with the test, and is run by the accelerator that the
// engine names.
func (l *lab) owned(t testing.TB, v vmm.VM, p vmm.Place, port int) *started {
	t.Helper()
	l.vms.Add(1)
	s := &started{VM: v, place: p, port: port}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s: console and VMM: %s\nprobe: %s", p.ID, v.Tail(), containerOutput(p))
		}
		s.end(t)
	})
	// What the engine says of itself is one thing, what the kernel sees another.
	if kvm, err := testreport.UsesKVM(v.Handle().PID); err == nil && kvm != (l.info.Accel == "kvm") {
		t.Errorf("%s: the VMM uses KVM: %t, and the accelerator is %s", p.ID, kvm, l.info.Accel)
	}
	return s
}

// containerOutput is all that the probe printed, and how it ended.
func containerOutput(p vmm.Place) string {
	f, err := os.Open(filepath.Join(p.Dir, "container.log"))
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	var b strings.Builder
	log, err := proto.LogFile(f, -1)
	if err != nil {
		return err.Error()
	}
	for r := proto.NewLogReader(log); ; {
		rec, err := r.Next()
		if err != nil {
			return b.String()
		}
		b.Write(rec.Data)
		if rec.Stream == proto.Exit {
			fmt.Fprintf(&b, "\nexit code %d", rec.ExitCode)
		}
	}
}

// end kills the VM, once.
func (s *started) end(t testing.TB) {
	t.Helper()
	if err := s.Kill(); err != nil {
		t.Errorf("kill: %v", err)
		return
	}
	<-s.Done()
	if err := s.Release(); err != nil {
		t.Errorf("release: %v", err)
	}
}

// agent connects to the guest's.
func (s *started) agent(ctx context.Context) (*agent.Client, error) {
	conn, err := s.DialAgent(ctx)
	if err != nil {
		return nil, err
	}
	return agent.Connect(ctx, conn)
}

// info asks the agent, over a connection of its own.
func (s *started) info(t testing.TB) proto.Info {
	t.Helper()
	ctx := within(t)
	c, err := s.agent(ctx)
	if err != nil {
		t.Fatalf("connect to the agent: %v\n%s", err, s.Tail())
	}
	defer func() { _ = c.Close() }()
	info, err := c.Info(ctx)
	if err != nil {
		t.Fatalf("ask the agent: %v", err)
	}
	return info
}

// startProbe starts the container's process, and waits until it answers.
func (s *started) startProbe(t testing.TB) proto.Info {
	t.Helper()
	ctx := within(t)
	c, err := s.agent(ctx)
	if err != nil {
		t.Fatalf("connect to the agent: %v\n%s", err, s.Tail())
	}
	err = c.Start(ctx, proto.ContainerSpec{Args: []string{"/probe"}, Hostname: "probe"})
	info, infoErr := c.Info(ctx)
	_ = c.Close() // the agent serves one connection at a time
	if err := errors.Join(err, infoErr); err != nil {
		t.Fatalf("start the probe: %v", err)
	}
	// The process exists, but does not listen yet.
	for {
		_, err := s.ask(ctx, "tcp4", "verify")
		if err == nil {
			return info
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the probe never answered: %v\n%s", err, s.Tail())
		case <-s.Done():
			t.Fatalf("the VM ended: %s", s.Tail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ask sends one line to the probe, and returns its answer.
func (s *started) ask(ctx context.Context, network, line string) (string, error) {
	if s.port == 0 {
		return s.askInside(ctx, line)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, "127.0.0.1:"+strconv.Itoa(s.port))
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "udp4" {
		return askUDP(c, line)
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return "", err
	}
	return answer[:len(answer)-1], nil
}

// askInside has the agent start a second probe, which asks the first.
func (s *started) askInside(ctx context.Context, line string) (string, error) {
	c, err := s.agent(ctx)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	stream, err := c.Exec(ctx, proto.ExecRequest{Args: []string{"/probe", line}})
	if err != nil {
		return "", err
	}
	defer func() { _ = stream.Close() }()
	var out, said strings.Builder
	for {
		f, err := proto.ReadFrame(stream, nil)
		if err != nil {
			return "", err
		}
		switch f.Type {
		case proto.FrameStdout:
			out.Write(f.Payload)
		case proto.FrameStderr:
			said.Write(f.Payload)
		case proto.FrameExit:
			answer, ok := strings.CutSuffix(out.String(), "\n")
			if !ok {
				return "", fmt.Errorf("ask the probe: %q, %q", &out, &said)
			}
			return answer, nil
		}
	}
}

func askUDP(c net.Conn, line string) (string, error) {
	if _, err := c.Write([]byte(line)); err != nil {
		return "", err
	}
	b := make([]byte, 512)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// want asks the probe and compares.
func (s *started) want(t testing.TB, line, want string) {
	t.Helper()
	got, err := s.ask(within(t), "tcp4", line)
	if err != nil || got != want {
		t.Errorf("%s: the probe says %q, error %v, want %q", line, got, err, want)
	}
}

func (s *started) count(t testing.TB) int {
	t.Helper()
	answer, err := s.ask(within(t), "tcp4", "count")
	if err != nil {
		t.Fatalf("count: %v\n%s", err, s.Tail())
	}
	n, err := strconv.Atoi(answer)
	if err != nil {
		t.Fatalf("count: the probe says %q", answer)
	}
	return n
}

// take makes a snapshot of s in dir, on top of the memory file parent, if any.
// The VM is left paused.
func (s *started) take(t testing.TB, dir, parent string) *snapshot {
	t.Helper()
	snap := &snapshot{mem: filepath.Join(dir, "mem"), state: filepath.Join(dir, "state"), bootID: s.info(t).BootID, count: s.count(t)}
	ctx := within(t)
	mem, err := os.OpenFile(snap.mem, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if parent != "" {
		from, err := os.Open(parent)
		if err != nil {
			t.Fatal(err)
		}
		err = procmem.CloneParent(ctx, from, mem)
		_ = from.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := mem.Truncate(size(s.Handle().Regions)); err != nil {
		t.Fatal(err)
	}
	if err := s.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveState(ctx, snap.state); err != nil {
		t.Fatal(err)
	}
	p, err := procmem.Open(s.Handle().PID)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	if _, err := p.Dump(ctx, s.Handle().Regions, mem, procmem.Options{Base: parent != ""}); err != nil {
		t.Fatal(err)
	}
	return snap
}

func size(regions []vmm.Region) int64 {
	var n int64
	for _, r := range regions {
		n += r.Size
	}
	return n
}

// notRunning tells whether err is an engine's word for a VM that has ended.
func notRunning(err error) bool { return errors.Is(err, vmm.ErrGone) }
