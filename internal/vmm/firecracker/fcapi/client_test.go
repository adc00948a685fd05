package fcapi_test

import (
	"context"
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fcvm/internal/vmm/firecracker/fcapi"
)

var update = flag.Bool("update", false, "write the golden files")

// versions are the first and the last that fcvm knows, and those at which
// something changed.
var versions = []string{"1.7.0", "1.11.0", "1.12.0", "1.13.1", "1.14.0", "1.14.4", "1.15.0", "1.15.1", "1.16.0", "1.16.1", "1.17.0-dev"}

func dial(t *testing.T, f *fake) *fcapi.Client {
	t.Helper()
	c, err := fcapi.Dial(t.Context(), f.start(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// everything makes each request once, with every field that the version has.
func everything(ctx context.Context, c *fcapi.Client) error {
	load := fcapi.SnapshotLoad{
		StateFile:       "/s/state.bin",
		Memory:          fcapi.MemoryBackend{Type: fcapi.UFFD, Path: "/run/pages.sock"},
		TrackDirtyPages: true,
		Resume:          true,
		ClockRealtime:   c.Has(fcapi.ClockRealtime),
	}
	if c.Has(fcapi.NetworkOverrides) {
		load.Network = []fcapi.NetworkOverride{{ID: "eth0", HostDevice: "tap1"}}
	}
	if c.Has(fcapi.VsockOverride) {
		load.VsockSocket = "/run/b/v.sock"
	}
	nic := fcapi.NetworkInterface{ID: "eth0", HostDevice: "tap0", MAC: "06:00:00:00:00:01"}
	if c.Has(fcapi.MTU) {
		nic.MTU = 1400
	}
	steps := []func() error{
		func() error {
			return c.SetLogger(ctx, fcapi.Logger{Path: "/v/vmm.log", Level: "Info", ShowLevel: true})
		},
		func() error { return c.SetMetrics(ctx, "/v/metrics") },
		func() error { return c.SetMachineConfig(ctx, fcapi.MachineConfig{VCPUs: 2, MemoryMiB: 512}) },
		func() error {
			return c.SetMachineConfig(ctx, fcapi.MachineConfig{VCPUs: 1, MemoryMiB: 256, TrackDirtyPages: true, HugePages: "2M"})
		},
		func() error {
			return c.SetBootSource(ctx, fcapi.BootSource{Kernel: "/g/vmlinux", Initrd: "/g/initramfs", Args: "console=ttyS0"})
		},
		func() error { return c.SetCPUConfig(ctx, []byte(`{"cpuid_modifiers":[]}`)) },
		func() error {
			return c.AddDrive(ctx, fcapi.Drive{ID: "root", Path: "rootfs", Root: true, ReadOnly: true})
		},
		func() error { return c.AddNetworkInterface(ctx, nic) },
		func() error { return c.SetVsock(ctx, fcapi.Vsock{CID: 3, Socket: "v.sock"}) },
		func() error {
			return c.SetBalloon(ctx, fcapi.Balloon{
				DeflateOnOOM: true, StatsInterval: 5,
				Reporting: c.Has(fcapi.FreePageReporting), Hinting: c.Has(fcapi.FreePageHinting),
			})
		},
		func() error { return c.AddEntropy(ctx) },
		func() error { return c.Do(ctx, fcapi.InstanceStart) },
		func() error { return c.Inflate(ctx, 64) },
		func() error { return c.SetStatsInterval(ctx, 1) },
		func() error { return c.SetState(ctx, fcapi.Paused) },
		func() error {
			return c.CreateSnapshot(ctx, fcapi.SnapshotCreate{Type: fcapi.Diff, StateFile: "/s/state.bin", MemoryFile: "/s/mem.img"})
		},
		func() error { return c.SetState(ctx, fcapi.Resumed) },
		func() error {
			return c.LoadSnapshot(ctx, fcapi.SnapshotLoad{StateFile: "/s/state.bin", Memory: fcapi.MemoryBackend{Type: fcapi.File, Path: "/s/mem.img"}})
		},
		func() error { return c.LoadSnapshot(ctx, load) },
	}
	if c.Has(fcapi.FreePageHinting) {
		steps = append(steps,
			func() error { return c.StartHinting(ctx) },
			func() error { return c.StopHinting(ctx) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// A version's Firecracker gets these requests, to the byte.
func TestRequestsOfEachVersion(t *testing.T) {
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			f := &fake{version: version}
			if err := everything(t.Context(), dial(t, f)); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(f.said, "\n") + "\n"
			golden := filepath.Join("testdata", version+".requests")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What a version cannot do is refused here, with a word that says which can.
func TestFieldsWaitForTheirVersion(t *testing.T) {
	use := map[fcapi.Feature]func(context.Context, *fcapi.Client) error{
		fcapi.NetworkOverrides: func(ctx context.Context, c *fcapi.Client) error {
			return c.LoadSnapshot(ctx, fcapi.SnapshotLoad{Network: []fcapi.NetworkOverride{{ID: "eth0", HostDevice: "tap1"}}})
		},
		fcapi.VsockOverride: func(ctx context.Context, c *fcapi.Client) error {
			return c.LoadSnapshot(ctx, fcapi.SnapshotLoad{VsockSocket: "v"})
		},
		fcapi.ClockRealtime: func(ctx context.Context, c *fcapi.Client) error {
			return c.LoadSnapshot(ctx, fcapi.SnapshotLoad{ClockRealtime: true})
		},
		fcapi.FreePageReporting: func(ctx context.Context, c *fcapi.Client) error {
			return c.SetBalloon(ctx, fcapi.Balloon{Reporting: true})
		},
		fcapi.FreePageHinting: func(ctx context.Context, c *fcapi.Client) error { return c.StartHinting(ctx) },
		fcapi.MTU: func(ctx context.Context, c *fcapi.Client) error {
			return c.AddNetworkInterface(ctx, fcapi.NetworkInterface{ID: "eth0", HostDevice: "tap0", MTU: 1400})
		},
	}
	for _, version := range versions {
		f := &fake{version: version}
		c := dial(t, f)
		for feature, do := range use {
			err := do(t.Context(), c)
			switch {
			case c.Has(feature) && err != nil:
				t.Errorf("%s with %s: %v", version, feature, err)
			case !c.Has(feature) && (!errors.Is(err, fcapi.ErrUnsupported) || !strings.Contains(err.Error(), feature.String()+" needs Firecracker 1.")):
				t.Errorf("%s with %s: error %v", version, feature, err)
			}
		}
	}
}

// The fake must be as strict as Firecracker, or the tests above show nothing.
func TestFakeRefusesUnknownFields(t *testing.T) {
	f := &fake{version: "1.11.0"}
	for request, body := range map[string]string{
		"PUT /snapshot/load": `{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"},"network_overrides":[]}`,
		"PUT /balloon":       `{"amount_mib":1,"deflate_on_oom":true,"free_page_reporting":true}`,
		"PUT /vsock":         `{"guest_cid":3,"uds_path":"v","more":1}`,
	} {
		if err := f.check(request, []byte(body)); err == nil {
			t.Errorf("%s %s is let through", request, body)
		}
	}
	for _, request := range []string{"PUT /nonsense", "PATCH /balloon/hinting/stop"} {
		if err := f.check(request, nil); err == nil {
			t.Errorf("%s is let through", request)
		}
	}
}

func TestRefusalSaysWhatFirecrackerSaid(t *testing.T) {
	f := &fake{version: "1.16.1", fails: map[string]string{
		"PUT /snapshot/load": "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file:\n Failed to load snapshot state from file: bad magic",
	}}
	err := dial(t, f).LoadSnapshot(t.Context(), fcapi.SnapshotLoad{StateFile: "s"})
	var refused *fcapi.Error
	if !errors.As(err, &refused) || refused.Status != 400 || refused.Path != "/snapshot/load" {
		t.Fatalf("error %#v", err)
	}
	const want = "firecracker refused PUT /snapshot/load: Load snapshot error: Failed to restore from snapshot: " +
		"Failed to get snapshot state from file: Failed to load snapshot state from file: bad magic: " +
		"the snapshot is damaged, or of another version of Firecracker"
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
}

// A load that fails ends Firecracker, sometimes before its answer is out.
func TestEndOfFirecrackerIsTold(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		buf := make([]byte, 4096)
		_, _ = conn.Read(buf)
		_, _ = conn.Write([]byte("HTTP/1.1 200 \r\nContent-Length: 32\r\n\r\n{\"firecracker_version\":\"1.16.1\"}"))
		_, _ = conn.Read(buf)
		_ = l.Close()
		_ = conn.Close()
	}()
	defer func() { <-done }()
	c, err := fcapi.Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 { // as it ends, and afterwards
		if err := c.LoadSnapshot(t.Context(), fcapi.SnapshotLoad{StateFile: "s"}); !errors.Is(err, fcapi.ErrClosed) {
			t.Errorf("error %v, want ErrClosed", err)
		}
	}
	if _, err := fcapi.Dial(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, fcapi.ErrClosed) {
		t.Errorf("error %v where nobody listens", err)
	}
}

func TestHangingFirecrackerIsGivenUp(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, errors.New("given up"))
	defer cancel()
	if _, err := fcapi.Dial(ctx, l.Addr().String()); err == nil || !strings.Contains(err.Error(), "given up") {
		t.Errorf("error %v", err)
	}
}

func TestOldFirecrackerIsRefused(t *testing.T) {
	for version, want := range map[string]string{"1.6.0": "older than 1.7.0", "one": "want three numbers", "": "want three numbers"} {
		_, err := fcapi.Dial(t.Context(), (&fake{version: version}).start(t))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("version %q: error %v, want %q", version, err, want)
		}
	}
}

func TestWhatIsAsked(t *testing.T) {
	f := &fake{version: "1.16.1", answers: map[string]string{
		"GET /":                   `{"id":"anonymous-instance","state":"Paused","vmm_version":"1.16.1","app_name":"Firecracker"}`,
		"GET /balloon/statistics": `{"target_pages":16384,"actual_pages":8192,"target_mib":64,"actual_mib":32,"free_memory":1048576}`,
	}}
	c := dial(t, f)
	i, err := c.Instance(t.Context())
	if err != nil || i.State != "Paused" {
		t.Errorf("instance %+v, error %v", i, err)
	}
	s, err := c.BalloonStats(t.Context())
	if err != nil || s.TargetMiB != 64 || s.ActualMiB != 32 || s.Free == nil || *s.Free != 1<<20 || s.SwapIn != nil {
		t.Errorf("statistics %+v, error %v", s, err)
	}
}

func TestVersions(t *testing.T) {
	for s, want := range map[string]fcapi.Version{
		"1.16.1": {1, 16, 1}, "v1.17.0-dev": {1, 17, 0}, "1.12.0-nemo": {1, 12, 0}, "2.0.0+fuzzing": {2, 0, 0},
	} {
		if got, err := fcapi.ParseVersion(s); err != nil || got != want {
			t.Errorf("%s: %v, error %v", s, got, err)
		}
	}
	for _, s := range []string{"", "1", "1.2", "1.2.x", "1.2.3.4", "-1.2.3", "1.2.99999999"} {
		if v, err := fcapi.ParseVersion(s); err == nil {
			t.Errorf("%q is %v", s, v)
		}
	}
	for s, want := range map[string]bool{"1.15.1": false, "1.16.0": true, "1.16.1": true, "1.17.0-dev": false} {
		if v, err := fcapi.ParseVersion(s); err != nil || v.ResumeStopsVsock() != want {
			t.Errorf("%s: resume stops vsock %v, error %v", s, !want, err)
		}
	}
	for s, want := range map[string]bool{"1.14.3": false, "1.14.4": true, "1.14.9": true, "1.15.0": false, "1.15.1": true, "1.16.0": true, "1.17.0": true, "2.0.0": true, "1.7.0": false} {
		v, err := fcapi.ParseVersion(s)
		if err != nil || v.Has(fcapi.ClockRealtime) != want {
			t.Errorf("%s: clock_realtime %v, error %v", s, !want, err)
		}
	}
}
