package supervisor

import (
	"strings"
	"testing"

	"fcvm/internal/api"
	"fcvm/internal/vmm"
)

func TestCheckNetwork(t *testing.T) {
	both := []vmm.Network{vmm.NetworkTAP, vmm.NetworkNone}
	port := []vmm.Port{{GuestPort: 80, Proto: "tcp"}}
	for _, tt := range []struct {
		req   api.RunRequest
		have  []vmm.Network
		want  vmm.Network
		error string
	}{
		{api.RunRequest{}, both, vmm.NetworkTAP, ""},
		{api.RunRequest{}, nil, "", ""},
		{api.RunRequest{Network: vmm.NetworkNone}, both, vmm.NetworkNone, ""},
		{api.RunRequest{Ports: port}, both, vmm.NetworkTAP, ""},
		{api.RunRequest{Network: vmm.NetworkNone, Ports: port}, both, "", "has no ports"},
		{api.RunRequest{Network: vmm.NetworkUser}, both, "", "the engine fc has tap, none"},
		{api.RunRequest{Network: "bridge"}, both, "", `no network "bridge"`},
	} {
		req := tt.req
		err := checkNetwork(&req, vmm.Info{Name: "fc", Networks: tt.have})
		switch {
		case tt.error == "" && (err != nil || req.Network != tt.want):
			t.Errorf("%+v: network %q, %v", tt.req, req.Network, err)
		case tt.error != "" && (err == nil || !strings.Contains(err.Error(), tt.error)):
			t.Errorf("%+v: %v, want %q", tt.req, err, tt.error)
		}
	}
}
