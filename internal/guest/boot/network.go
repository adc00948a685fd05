package boot

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

const device = "eth0"

// configureNetwork brings up lo, and eth0 with what the command line says. It
// returns the address, or "" when there is no network.
func configureNetwork(params map[string]string) (string, error) {
	// IPv4 ioctls are all that a static address needs; netlink would be the larger
	// part of this program.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("configure network: %w", err)
	}
	defer unix.Close(fd)
	if err := up(fd, "lo"); err != nil {
		return "", fmt.Errorf("configure lo: %w", err)
	}
	if params["fcvm.ip"] == "" {
		return "", nil
	}
	if _, err := os.Stat("/sys/class/net/" + device); errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	ip, err := netip.ParsePrefix(params["fcvm.ip"])
	if err != nil || !ip.Addr().Is4() {
		return "", fmt.Errorf("configure network: fcvm.ip=%s is not an IPv4 address with its prefix length", params["fcvm.ip"])
	}
	// No router advertises here, and nothing shall wake the guest to look for one.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+device+"/disable_ipv6", []byte("1"), 0)
	mask := netip.AddrFrom4(maskOf(ip.Bits()))
	if err := setAddress(fd, unix.SIOCSIFADDR, ip.Addr()); err != nil {
		return "", fmt.Errorf("set address of %s: %w", device, err)
	}
	if err := setAddress(fd, unix.SIOCSIFNETMASK, mask); err != nil {
		return "", fmt.Errorf("set netmask of %s: %w", device, err)
	}
	if err := up(fd, device); err != nil {
		return "", fmt.Errorf("bring up %s: %w", device, err)
	}
	if params["fcvm.gw"] != "" {
		gw, err := netip.ParseAddr(params["fcvm.gw"])
		if err != nil || !gw.Is4() {
			return "", fmt.Errorf("configure network: fcvm.gw=%s is no IPv4 address", params["fcvm.gw"])
		}
		if err := addDefaultRoute(fd, gw); err != nil {
			return "", fmt.Errorf("add default route: %w", err)
		}
	}
	return ip.Addr().String(), nil
}

func maskOf(bits int) (m [4]byte) {
	for i := range bits {
		m[i/8] |= 0x80 >> (i % 8)
	}
	return m
}

func up(fd int, name string) error {
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	r.SetUint16(r.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

func setAddress(fd int, request uint, addr netip.Addr) error {
	r, err := unix.NewIfreq(device)
	if err != nil {
		return err
	}
	b := addr.As4()
	if err := r.SetInet4Addr(b[:]); err != nil {
		return err
	}
	return unix.IoctlIfreq(fd, request, r)
}

// rtentry is struct rtentry of include/uapi/linux/route.h.
type rtentry struct {
	_       structs.HostLayout
	_       uint64
	dst     unix.RawSockaddrInet4
	gateway unix.RawSockaddrInet4
	genmask unix.RawSockaddrInet4
	flags   uint16
	_       int16
	_       uint64
	_       uintptr
	metric  int16
	dev     uintptr
	mtu     uint64
	window  uint64
	irtt    uint16
}

func addDefaultRoute(fd int, gw netip.Addr) error {
	r := rtentry{
		dst:     unix.RawSockaddrInet4{Family: unix.AF_INET},
		gateway: unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: gw.As4()},
		genmask: unix.RawSockaddrInet4{Family: unix.AF_INET},
		flags:   unix.RTF_UP | unix.RTF_GATEWAY,
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&r)))
	runtime.KeepAlive(&r)
	if errno != 0 {
		return errno
	}
	return nil
}
