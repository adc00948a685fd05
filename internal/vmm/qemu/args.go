package qemu

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"fcvm/internal/network/tapnet"
	"fcvm/internal/vmm"
)

// Names that the guest knows its two virtio-serial ports by.
const (
	portAgent = "fcvm.agent"
	portLog   = "fcvm.log"
)

// Files in [vmm.Place].
const (
	consoleLog   = "console.log"   // Dir
	containerLog = "container.log" // Dir
	vmmLog       = "vmm.log"       // Dir
	qmpSocket    = "qmp.sock"      // Runtime
	agentSocket  = "agent.sock"    // Runtime
)

// tbMiB bounds TCG's cache of translated code, which is 1 GiB if QEMU chooses,
// and all of it a VM's own. A full cache is flushed and filled again. A boot
// fills 64 MiB: with 32 it took half as long again, with 128 no less. A clone
// that answers a few requests fills 10.
const tbMiB = 64

// machine is what the command line is made of.
type machine struct {
	vmm.Place
	vmm.Machine
	ports []vmm.Port
	accel accel
	cpu   string

	// qmpFD and agentFD are listening sockets in the child.
	qmpFD, agentFD int

	// kernel, initrd and cmdline are set for a boot. A clone has no use for
	// them: what the kernel needs is in its memory. Reading them costs 10 ms.
	kernel, initrd, cmdline string
	// stateFD holds the device state in the child; 0 for a boot.
	stateFD int
	// paused keeps the guest from running once its state is loaded.
	paused bool
	// merge has the kernel merge pages with those of others.
	merge bool
	// memFD is mapped by QEMU itself as the guest's memory, in the child; 0 for
	// anonymous memory, which Boot wants, and which is replaced when attached.
	memFD int
}

// args is QEMU's command line. The guest's devices, and their order, must be
// the same for a VM and for its clones, because the device state names them by
// position.
func (m machine) args() ([]string, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	network, err := m.network()
	if err != nil {
		return nil, err
	}
	// QEMU leaves the clock chip out under KVM only. Linux looks for it all the same,
	// and polls the empty ports: 7 s of a boot on a nested KVM, without other load.
	machineType := "microvm,memory-backend=ram,suppress-vmdesc=on,x-option-roms=off,rtc=on"
	accelArg := string(m.accel)
	if m.accel == tcg {
		// The guest keeps time by its APIC and the TSC, and never stops the PIT, for
		// which QEMU wakes 36 times a second: 3 ms of each second, of each idle VM.
		machineType += ",pit=off"
		accelArg += ",tb-size=" + strconv.Itoa(tbMiB)
	}
	a := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-name", "guest=" + escape("fcvm-"+m.ID),
		// QEMU's own seccomp filter. Threads and its user-mode network need
		// nothing of what it denies.
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", machineType + m.merging(),
		"-accel", accelArg,
		"-cpu", m.cpu,
		"-smp", strconv.Itoa(m.CPUs),
		"-m", strconv.FormatInt(m.MemoryBytes>>20, 10) + "M",
		"-object", m.memory(),
		// Two QEMUs differ in machine options that the guest does not see.
		"-global", "migration.send-configuration=off",
		// Nobody learns a clone's address: its network is QEMU's own. The guest
		// would be interrupted for each round.
		"-global", "migration.announce-rounds=0",
		"-global", "virtio-mmio.force-legacy=false",
		"-chardev", socket("qmp", m.qmpFD, false), "-mon", "chardev=qmp,mode=control",
		"-chardev", "file,id=console,append=on,path=" + escape(filepath.Join(m.Dir, consoleLog)),
		"-serial", "chardev:console",
		// QEMU waits for the connection that is there already (launch.open), so that
		// the port is open before the device state is loaded: no event for the guest.
		"-chardev", socket("agent", m.agentFD, true),
		"-chardev", "file,id=log,append=on,path=" + escape(filepath.Join(m.Dir, containerLog)),
		"-device", "virtio-serial-device",
		"-device", "virtserialport,chardev=agent,name=" + portAgent,
		"-device", "virtserialport,chardev=log,name=" + portLog,
	}
	if m.RootFS != "" {
		drive, err := rootDrive(m.RootFS)
		if err != nil {
			return nil, err
		}
		a = append(a, "-blockdev", drive, "-device", "virtio-blk-device,drive=root")
	}
	a = append(a, network...)
	a = append(a,
		"-device", "virtio-rng-device",
		"-device", "virtio-balloon-device,id=balloon,free-page-reporting=on,page-poison=off",
	)
	if m.kernel != "" {
		a = append(a, "-kernel", m.kernel, "-initrd", m.initrd, "-append", m.cmdline)
	}
	if m.stateFD != 0 {
		// Loaded before the first command is carried out; a running guest is
		// the sign that it is. "cont" is not needed: the state says that the VM
		// was running when it was saved.
		a = append(a, "-incoming", "fd:"+strconv.Itoa(m.stateFD))
	}
	if m.paused {
		a = append(a, "-S")
	}
	return a, nil
}

func (m machine) check() error {
	switch {
	case m.MemoryBytes <= 0 || m.MemoryBytes%(2<<20) != 0:
		return fmt.Errorf("guest memory of %d bytes: want a multiple of 2 MiB", m.MemoryBytes)
	case m.CPUs < 1:
		return fmt.Errorf("%d CPUs: want at least 1", m.CPUs)
	case strings.ContainsRune(m.kernel, 0) || strings.ContainsRune(m.cmdline, 0):
		return fmt.Errorf("kernel or its command line holds a NUL byte")
	}
	return nil
}

// merging keeps QEMU from what it does unless told not to: to have the kernel merge
// pages with those of others, wherever KSM runs, which tells guests of each other.
func (m machine) merging() string {
	if m.merge {
		return ",mem-merge=on"
	}
	return ",mem-merge=off"
}

func (m machine) memory() string {
	size := ",size=" + strconv.FormatInt(m.MemoryBytes, 10)
	if m.memFD == 0 {
		return "memory-backend-ram,id=ram" + size
	}
	return "memory-backend-file,id=ram,share=off,mem-path=/proc/self/fd/" + strconv.Itoa(m.memFD) + size
}

// socket listens on fd, and may wait for the first connection.
func socket(id string, fd int, wait bool) string {
	onOff := "off"
	if wait {
		onOff = "on"
	}
	return "socket,id=" + id + ",server=on,wait=" + onOff + ",fd=" + strconv.Itoa(fd)
}

// rootDrive is read-only, and its file is locked by nobody: many VMs share it.
func rootDrive(path string) (string, error) {
	drive, err := json.Marshal(map[string]any{
		"node-name": "root",
		"driver":    "raw",
		"read-only": true,
		"file": map[string]any{
			"driver":    "file",
			"filename":  path,
			"read-only": true,
			"locking":   "off",
		},
	})
	if err != nil {
		return "", fmt.Errorf("encode root drive: %w", err)
	}
	return string(drive), nil
}

// network is the guest's network device, if it has one.
func (m machine) network() ([]string, error) {
	var netdev string
	switch m.Network {
	case "", vmm.NetworkUser:
		var err error
		if netdev, err = userNetwork(m.ports); err != nil {
			return nil, err
		}
	case vmm.NetworkTAP, vmm.NetworkTAPHost:
		netdev = "tap,id=net,ifname=" + tapnet.Device + ",script=no,downscript=no"
	case vmm.NetworkNone:
		if len(m.ports) > 0 {
			return nil, vmm.ErrNoNetwork
		}
		return nil, nil
	default:
		return nil, fmt.Errorf("network %q: the engine qemu has user, tap, tap-host and none", m.Network)
	}
	return []string{"-netdev", netdev, "-device", "virtio-net-device,netdev=net,guest_announce=off"}, nil
}

// userNetwork is QEMU's own TCP/IP (slirp): the guest is 10.0.2.15, its router
// 10.0.2.2, its name server 10.0.2.3.
func userNetwork(ports []vmm.Port) (string, error) {
	var b strings.Builder
	b.WriteString("user,id=net,ipv6=off")
	for _, p := range ports {
		f, err := forward(p)
		if err != nil {
			return "", fmt.Errorf("publish port %d: %w", p.HostPort, err)
		}
		b.WriteString(",hostfwd=" + f)
	}
	return b.String(), nil
}

func forward(p vmm.Port) (string, error) {
	if p.Proto != "tcp" && p.Proto != "udp" {
		return "", fmt.Errorf("protocol %q: use tcp or udp", p.Proto)
	}
	for _, n := range []int{p.HostPort, p.GuestPort} {
		if n < 1 || n > 65535 {
			return "", fmt.Errorf("port %d: want 1 to 65535", n)
		}
	}
	if p.HostIP != "" {
		ip, err := netip.ParseAddr(p.HostIP)
		if err != nil {
			return "", fmt.Errorf("address %q: %w", p.HostIP, err)
		}
		if !ip.Unmap().Is4() {
			return "", fmt.Errorf("address %s: QEMU's user-mode network publishes on IPv4 addresses only", ip)
		}
		p.HostIP = ip.Unmap().String()
	}
	return fmt.Sprintf("%s:%s:%d-:%d", p.Proto, p.HostIP, p.HostPort, p.GuestPort), nil
}

// escape doubles commas, which end a value in QEMU's options.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
