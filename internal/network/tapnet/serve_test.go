//go:build linux

package tapnet

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"testing"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
)

// checker publishes nothing, but refuses what nobody could publish.
type checker struct{}

func (checker) Publish(_ context.Context, ports []vmm.Port) error { return network.Check(ports) }

// FuzzAnswer: whatever a client says, it gets a whole answer or none, and nothing hangs.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"publish":[{"host_ip":"127.0.0.1","host_port":8080,"guest_port":80,"proto":"tcp"}]}` + "\n"))
	f.Add([]byte(`{"publish":[{"host_port":-1}]}` + "\n"))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, request []byte) {
		client, server := net.Pipe()
		answered := make(chan error, 1)
		go func() {
			answered <- answer(server, checker{})
			server.Close()
		}()
		said := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(client)
			said <- b
		}()
		_, _ = client.Write(request) // ends early when the other side has read enough
		var got []byte
		if len(request) == 0 || request[len(request)-1] != '\n' {
			client.Close()
		}
		got = <-said
		client.Close()
		if err := <-answered; err != nil {
			return
		}
		var reply Reply
		if err := json.Unmarshal(got, &reply); err != nil {
			t.Errorf("%q was answered by %q: %v", request, got, err)
		}
	})
}
