//go:build linux

package tapnet

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Device is the TAP's name in every VM's network namespace: the device state of a
// snapshot holds it.
const Device = "fcvm0"

const tunDevice = "/dev/net/tun"

// linkBuffer is what may wait in each direction, in bytes. Three segments of TCP as
// the kernel cuts them fill a socket's default buffer, and what does not fit is lost.
const linkBuffer = 4 << 20

// Usable says why this user cannot have TAPs here, if so.
func Usable() error {
	f, err := os.OpenFile(tunDevice, os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: let this user open %s, or run with --network none", err, tunDevice)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: load the kernel module tun, or run with --network none", err)
	}
	return err
}

// makeTAP makes the VM's TAP in this thread's network namespace.
func makeTAP() error {
	if err := Usable(); err != nil {
		return fmt.Errorf("make TAP: %w", err)
	}
	if err := addTAP(); err != nil {
		return fmt.Errorf("make TAP: %w", err)
	}
	tap, err := netlink.LinkByName(Device)
	if err != nil {
		return fmt.Errorf("find TAP: %w", err)
	}
	// The kernel itself has nothing to say to the guest.
	const noIPv6 = "/proc/sys/net/ipv6/conf/" + Device + "/disable_ipv6"
	if err := os.WriteFile(noIPv6, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make TAP: %w", err)
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		return fmt.Errorf("bring up TAP: %w", err)
	}
	return nil
}

// addTAP makes a TAP that stays and has no owner: whoever is in the namespace may open
// it, also a VMM that changes its user. (netlink.LinkAdd always sets one.)
func addTAP() error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(Device)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return err
	}
	return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
}

// Packets opens a packet socket on an interface of this thread's network namespace
// that is up. It receives what comes from the interface's other side, such as the guest.
func Packets(device string) (_ *os.File, err error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "packets:"+device)
	defer func() {
		if err != nil {
			_ = f.Close()
			err = fmt.Errorf("open packet socket: %w", err)
		}
	}()
	link, err := netlink.LinkByName(device)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return nil, err
	}
	for force, plain := range map[int]int{unix.SO_SNDBUFFORCE: unix.SO_SNDBUF, unix.SO_RCVBUFFORCE: unix.SO_RCVBUF} {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, linkBuffer)
		if errors.Is(err, unix.EPERM) {
			// Others than the host's root get what net.core.wmem_max and rmem_max allow.
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, linkBuffer)
		}
		if err != nil {
			return nil, err
		}
	}
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // in network order
	return f, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index})
}
