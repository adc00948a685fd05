package fcapi_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"fcvm/internal/vmm/firecracker/fcapi"
)

// known lists for each request the fields that a version knows, by the struct
// definitions of Firecracker's releases: first what all know, then what came when,
// as "FIELD@VERSION". An object within a field is written "FIELD.INNER".
var known = map[string][]string{
	"GET /":                        nil,
	"GET /version":                 nil,
	"GET /balloon/statistics":      nil,
	"PUT /machine-config":          {"vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"},
	"PUT /boot-source":             {"kernel_image_path", "initrd_path", "boot_args"},
	"PUT /cpu-config":              {"kvm_capabilities@1.11.0", "cpuid_modifiers", "msr_modifiers"},
	"PUT /drives/root":             {"drive_id", "partuuid", "is_root_device", "cache_type", "is_read_only", "path_on_host", "rate_limiter", "io_engine", "socket"},
	"PUT /network-interfaces/eth0": {"iface_id", "host_dev_name", "guest_mac", "rx_rate_limiter", "tx_rate_limiter", "mtu@1.16.0"},
	"PUT /vsock":                   {"guest_cid", "uds_path", "vsock_id"},
	"PUT /entropy":                 {"rate_limiter"},
	"PUT /logger":                  {"log_path", "level", "show_level", "show_log_origin", "module"},
	"PUT /metrics":                 {"metrics_path"},
	"PUT /actions":                 {"action_type"},
	"PUT /balloon":                 {"amount_mib", "deflate_on_oom", "stats_polling_interval_s", "free_page_hinting@1.14.0", "free_page_reporting@1.14.0"},
	"PATCH /balloon":               {"amount_mib"},
	"PATCH /balloon/statistics":    {"stats_polling_interval_s"},
	"PATCH /balloon/hinting/start": {"acknowledge_on_stop@1.14.0"},
	"PATCH /balloon/hinting/stop":  {"@1.14.0"},
	"PATCH /vm":                    {"state"},
	"PUT /snapshot/create":         {"snapshot_type", "snapshot_path", "mem_file_path"},
	"PUT /snapshot/load": {
		"snapshot_path", "mem_file_path", "mem_backend", "mem_backend.backend_type", "mem_backend.backend_path", "enable_diff_snapshots", "resume_vm",
		"network_overrides@1.12.0", "network_overrides.iface_id@1.12.0", "network_overrides.host_dev_name@1.12.0",
		"track_dirty_pages@1.13.0",
		"clock_realtime@1.14.4,1.15.1,1.16.0",
		"vsock_override@1.16.0", "vsock_override.uds_path@1.16.0",
	},
}

// fake is a server that refuses what Firecracker of its version refuses.
type fake struct {
	version string
	// answers overrides what is answered, by "METHOD /path".
	answers map[string]string
	// fails makes a request fail with this message.
	fails map[string]string

	mu   sync.Mutex
	said []string // guarded by mu: requests, as in the golden files
}

// start serves until the test ends, and returns the socket.
func (f *fake) start(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: f}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return socket
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	request := r.Method + " " + r.URL.Path
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = f.check(request, body)
	}
	if message := f.fails[request]; err == nil && message != "" {
		err = fmt.Errorf("%s", message)
	}
	f.mu.Lock()
	f.said = append(f.said, strings.TrimSpace(request+" "+string(body)))
	f.mu.Unlock()
	switch {
	case err != nil:
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
	case r.Method == http.MethodGet && f.answers[request] != "":
		_, _ = io.WriteString(w, f.answers[request])
	case request == "GET /version":
		_ = json.NewEncoder(w).Encode(map[string]string{"firecracker_version": f.version})
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// check refuses a body as serde does with deny_unknown_fields.
func (f *fake) check(request string, body []byte) error {
	rules, ok := known[request]
	if !ok {
		return fmt.Errorf("invalid request method and/or path: %s", request)
	}
	v, err := fcapi.ParseVersion(f.version)
	if err != nil {
		return err
	}
	var allowed []string
	for _, rule := range rules {
		field, since, gated := strings.Cut(rule, "@")
		if !gated || reached(v, since) {
			allowed = append(allowed, field)
		} else if field == "" {
			return fmt.Errorf("invalid request method and/or path: %s", request)
		}
	}
	if len(body) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(body))
	var object map[string]any
	if err := d.Decode(&object); err != nil {
		return err
	}
	return refuse(object, "", allowed)
}

// reached tells whether v is at or after the last of the versions, or at or after
// one on its own branch.
func reached(v fcapi.Version, since string) bool {
	all := strings.Split(since, ",")
	for i, s := range all {
		from, err := fcapi.ParseVersion(s)
		if err != nil {
			panic(err)
		}
		sameBranch := v.Major == from.Major && v.Minor == from.Minor
		if v.Compare(from) >= 0 && (sameBranch || i == len(all)-1) {
			return true
		}
	}
	return false
}

func refuse(object map[string]any, prefix string, allowed []string) error {
	for name, value := range object {
		if !slices.Contains(allowed, prefix+name) {
			return fmt.Errorf("An error occurred when deserializing the json body of a request: unknown field `%s`", name)
		}
		inner := []any{value}
		if list, ok := value.([]any); ok {
			inner = list
		}
		for _, v := range inner {
			if o, ok := v.(map[string]any); ok {
				if err := refuse(o, prefix+name+".", allowed); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
