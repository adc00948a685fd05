package qemu

import (
	"net"
	"strconv"
	"strings"
	"testing"

	"fcvm/internal/vmm"
)

func TestPortInUseIsExplained(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	ports := []vmm.Port{{HostIP: "127.0.0.1", HostPort: port, GuestPort: 80, Proto: "tcp"}}
	said := "qemu: -netdev user,id=net: Could not set up host forwarding rule 'tcp:127.0.0.1:" + strconv.Itoa(port) + "-:80'"
	if err := explainPort(ports, said); err == nil || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), strconv.Itoa(port)+"/tcp") {
		t.Errorf("error %v", err)
	}
	if err := explainPort(ports, "something else"); err != nil {
		t.Errorf("error %v where there is none", err)
	}
}
