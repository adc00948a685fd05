//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
	"fcvm/internal/vmm"
)

func TestClone(t *testing.T) {
	f := &fake{clones: []api.VM{{Name: "web-10"}, {Name: "web-2", Warnings: []string{"no ptrace"}}, {Name: "web-1", Warnings: []string{"no ptrace"}}}}
	l := startFake(t, f)
	r := fcvm(t, l, "", "clone", "--snapshot", "s", "--name", "web", "-n", "3", "-p", "8080:80", "-e", "A=1", "--policy", "copy")
	if r.code != 0 || r.out != "web-1\nweb-2\nweb-10\n" || r.errOut != "fcvm: warning: no ptrace\n" {
		t.Error(r)
	}
	want := api.CloneRequest{
		Snapshot: "s", Name: "web", Count: 3, MemBackend: "uffd", Policy: "copy", Env: []string{"A=1"},
		Ports: []vmm.Port{{HostPort: 8080, GuestPort: 80, Proto: "tcp"}},
	}
	f.look(func() {
		if d := cmp.Diff([]api.CloneRequest{want}, f.cloneReq); d != "" {
			t.Error(d)
		}
	})
}

// Names are results: of a request that failed there are none, and nothing is left.
func TestCloneFails(t *testing.T) {
	f := &fake{clones: []api.VM{{Name: "web-1"}}, cloneErr: &api.Error{Code: api.CodeConflict, Message: "port 80 is taken"}}
	l := startFake(t, f)
	r := fcvm(t, l, "", "clone", "--snapshot", "s", "-n", "2")
	if r.code != 4 || r.out != "" || r.errOut != "fcvm: error: port 80 is taken\n" {
		t.Error(r)
	}
	r = fcvm(t, l, "", "clone", "--snapshot", "s", "-n", "2", "--json")
	var got failure
	if err := json.Unmarshal([]byte(r.errOut), &got); err != nil {
		t.Fatal(err, r)
	}
	want := failure{Version: 1, Code: api.CodeConflict, Message: "port 80 is taken", ExitCode: 4}
	if got != want || r.code != 4 || r.out != "" {
		t.Error(r)
	}
}

// withVM returns a fake with one VM that runs, called box.
func withVM(t *testing.T, f *fake) func(stdin string, args ...string) result {
	t.Helper()
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	if f.process == nil {
		f.process = func(*fakeProcess) { <-stop }
	}
	l := startFake(t, f)
	if r := fcvm(t, l, "", "run", "-d", "--name", "box", "-p", "127.0.0.1:8080:80", ociDir(t, t.TempDir(), "cmd")); r.code != 0 {
		t.Fatal(r)
	}
	return func(stdin string, args ...string) result { return fcvm(t, l, stdin, args...) }
}

func TestList(t *testing.T) {
	run := withVM(t, &fake{})
	for _, cmd := range []string{"ls", "ps"} {
		if r := run("", cmd); !strings.Contains(r.out, "box ") || !strings.Contains(r.out, "running") || !strings.Contains(r.out, "127.0.0.1:8080->80/tcp") {
			t.Error(r)
		}
	}
	var list struct {
		Version int
		VMs     []api.VM
	}
	r := run("", "ls", "--json")
	if err := json.Unmarshal([]byte(r.out), &list); err != nil || list.Version != 1 || len(list.VMs) != 1 || list.VMs[0].Name != "box" {
		t.Error(err, r)
	}
	var vm map[string]any
	r = run("", "inspect", "box", "nobody")
	if err := json.Unmarshal([]byte(r.out), &vm); err != nil || vm["version"] != 1.0 || vm["name"] != "box" || vm["state"] != "running" {
		t.Error(err, r)
	}
	if r.code != 3 || !strings.Contains(r.errOut, "no such VM: nobody") {
		t.Error(r)
	}
}

// What has exited is listed with -a only.
func TestListExited(t *testing.T) {
	f := &fake{process: func(p *fakeProcess) { p.code = 4 }}
	run := withVM(t, f)
	if r := run("", "wait", "box"); r.out != "4\n" {
		t.Error(r)
	}
	if r := run("", "ls", "-q"); r.out != "" {
		t.Error(r)
	}
	if r := run("", "ls", "-a"); !strings.Contains(r.out, "exited (4)") {
		t.Error(r)
	}
	if r := run("", "rm", "box"); r.code != 0 || r.out != "box\n" {
		t.Error(r)
	}
}

func TestControl(t *testing.T) {
	f := &fake{}
	run := withVM(t, f)
	for _, args := range [][]string{
		{"pause", "box"}, {"resume", "box"}, {"stop", "-t", "1.5", "box"}, {"stop", "--time", "1m", "box"},
		{"kill", "box"}, {"kill", "-s", "sighup", "box"}, {"kill", "--signal", "10", "box"},
	} {
		if r := run("", args...); r.code != 0 || r.out != "box\n" {
			t.Errorf("%q: %v", args, r)
		}
	}
	want := []string{"pause box", "resume box", "stop box 1.5s", "stop box 1m0s", "kill KILL", "kill HUP", "kill USR1"}
	if got := f.called(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	// One that fails does not keep the others from it.
	r := run("", "stop", "nobody", "box")
	if r.code != 3 || r.out != "box\n" || !strings.Contains(r.errOut, "nobody") {
		t.Error(r)
	}
	if r := run("", "rm", "-f", "nobody"); r.code != 0 {
		t.Error(r)
	}
}

func TestSnapshotCreate(t *testing.T) {
	run := withVM(t, &fake{})
	if r := run("", "snapshot", "create", "box", "--name", "s"); r.code != 0 || r.out != "s\n" || r.errOut != "paused for 12.3 ms\n" {
		t.Error(r)
	}
	if r := run("", "snapshot", "create", "nobody", "--name", "s"); r.code != 3 || r.out != "" {
		t.Error(r)
	}
}

func TestLogs(t *testing.T) {
	f := &fake{process: func(p *fakeProcess) {
		p.write(proto.Stdout, "one\ntw")
		p.write(proto.Stderr, "bad\n")
		p.write(proto.Stdout, "o\n")
	}}
	run := withVM(t, f)
	if r := run("", "logs", "-f", "box"); r.code != 0 || r.out != "one\ntwo\n" || r.errOut != "bad\n" {
		t.Error(r)
	}
	stamp := time.Unix(1700000000, 0).UTC().Format(stampLayout)
	r := run("", "logs", "-t", "box")
	if r.out != stamp+" one\n"+stamp+" two\n" || r.errOut != stamp+" bad\n" {
		t.Error(r)
	}
}

func TestLogsFollowUntilInterrupted(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	f := &fake{process: func(p *fakeProcess) {
		p.write(proto.Stdout, "ready\n")
		<-stop
	}}
	l := startFake(t, f)
	if r := fcvm(t, l, "", "run", "-d", "--name", "box", ociDir(t, t.TempDir(), "cmd")); r.code != 0 {
		t.Fatal(r)
	}
	cmd := command(t, l, "logs", "-f", "box")
	lines, wait := start(t, cmd)
	lines.until(t, "ready")
	must(t, cmd.Process.Signal(os.Interrupt))
	if r := wait(); r.code != 130 {
		t.Error(r)
	}
	if rest, _ := io.ReadAll(lines.r); len(rest) > 0 {
		t.Errorf("printed %q", rest)
	}
}

func TestStats(t *testing.T) {
	f := &fake{stats: api.Stats{
		VMs: []api.VMStats{
			{Name: "web-1", RSSBytes: 100 << 20, PrivateBytes: 4 << 20, SharedBytes: 96 << 20, PSSBytes: 10 << 20, OverheadBytes: 29 << 20, Faults: 1234, MemoryBytes: 256 << 20},
			{Name: "web-2", RSSBytes: 100 << 20, MemoryBytes: 256 << 20, Hint: "--policy share would hold less"},
		},
		PageServers: []api.PageServerStats{{
			Snapshot: "base", Policy: "share", TemplateBytes: 90 << 20, Sessions: 2, ReplayedBytes: 30 << 20, BackgroundBytes: 3 << 20,
			Demand: api.Latency{Count: 9, P50Micros: 8.192, P99Micros: 2097.152}, Handovers: api.Handovers{Count: 2, LongestMillis: 80},
		}},
		Total: api.TotalStats{UnsharedBytes: 200 << 20, HeldBytes: 50 << 20, SavedPercent: 75, MemoryBytes: 512 << 20, Spares: 2, SpareBytes: 28 << 20},
	}}
	l := startFake(t, f)
	r := fcvm(t, l, "", "stats")
	for _, want := range []string{"web-1", "1234", "96MiB", "base", "90MiB", "33MiB", "<8.19µs", "<2.1ms", "page servers were replaced 2 times, within 80", "2 VMs: 200MiB if nothing were shared, 50MiB held, 75.0% saved (90.2% of the guests' 512MiB)", "2 spares for the next clones: 28MiB", "hint: --policy share"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("no %q in:\n%s", want, r.out)
		}
	}
	r = fcvm(t, l, "", "stats", "--json", "--no-stream")
	var got map[string]any
	if err := json.Unmarshal([]byte(r.out), &got); err != nil {
		t.Fatal(err, r)
	}
	vm := got["vms"].([]any)[0].(map[string]any)
	for _, k := range []string{"name", "rss_bytes", "pss_bytes", "private_bytes", "shared_bytes", "overhead_bytes", "faults"} {
		if _, ok := vm[k]; !ok {
			t.Errorf("vms[] has no %s: %v", k, vm)
		}
	}
	total := got["total"].(map[string]any)
	if got["version"] != 1.0 || total["unshared_bytes"] != float64(200<<20) || total["held_bytes"] != float64(50<<20) || total["saved_percent"] != 75.0 {
		t.Errorf("%v", got)
	}
}

func TestCopyIn(t *testing.T) {
	f := &fake{}
	run := withVM(t, f)
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "tree/sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "tree/sub/w"), []byte("words"), 0o640))
	if r := run("", "cp", filepath.Join(dir, "tree"), "box:/root"); r.code != 0 {
		t.Fatal(r)
	}
	got := map[string]string{}
	var sent []byte
	f.look(func() { sent = f.copied["box:/root"] })
	for tr := tar.NewReader(bytes.NewReader(sent)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		b, _ := io.ReadAll(tr)
		got[h.Name] = string(b)
	}
	if d := cmp.Diff(map[string]string{"tree/": "", "tree/sub/": "", "tree/sub/w": "words"}, got); d != "" {
		t.Error(d)
	}
	if r := run("", "cp", filepath.Join(dir, "nothing"), "box:/root"); r.code != 2 || !strings.Contains(r.errOut, "nothing") {
		t.Error(r)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tarOf(t *testing.T, hdrs ...tar.Header) io.ReadCloser {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range hdrs {
		text := ""
		if h.Typeflag == tar.TypeReg {
			text = "content of " + h.Name
			h.Size = int64(len(text))
		}
		must(t, tw.WriteHeader(&h))
		_, err := io.WriteString(tw, text)
		must(t, err)
	}
	must(t, tw.Close())
	return io.NopCloser(&b)
}

func TestCopyOut(t *testing.T) {
	f := &fake{}
	run := withVM(t, f)
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "there"), 0o755))
	for _, tt := range []struct {
		to, made string
	}{
		{"new", "new"}, {"there", "there/passwd"}, {"there/", "there/passwd"}, {"there/other", "there/other"},
	} {
		f.setCopyOut(tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "passwd", Mode: 0o4755, Uid: 1234}))
		if r := run("", "cp", "box:/etc/passwd", filepath.Join(dir, tt.to)+strings.TrimPrefix(tt.to, strings.TrimSuffix(tt.to, "/"))); r.code != 0 {
			t.Fatal(tt.to, r)
		}
		fi, err := os.Lstat(filepath.Join(dir, tt.made))
		must(t, err)
		if fi.Mode() != 0o755 {
			t.Errorf("mode %v: a guest's set-user-ID program would be ours", fi.Mode())
		}
	}
	f.setCopyOut(tarOf(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "tree/", Mode: 0o755},
		tar.Header{Typeflag: tar.TypeDir, Name: "tree/sub/", Mode: 0o755},
		tar.Header{Typeflag: tar.TypeReg, Name: "tree/sub/w", Mode: 0o600}))
	if r := run("", "cp", "box:/root/tree", filepath.Join(dir, "back")); r.code != 0 {
		t.Fatal(r)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "back/sub/w")); err != nil || string(b) != "content of tree/sub/w" {
		t.Error(err, b)
	}
	// DIR/. is what is in the directory, whether the target is there or not.
	for range 2 {
		f.setCopyOut(tarOf(t,
			tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
			tar.Header{Typeflag: tar.TypeDir, Name: "sub/", Mode: 0o755},
			tar.Header{Typeflag: tar.TypeReg, Name: "sub/w", Mode: 0o600}))
		if r := run("", "cp", "box:/root/tree/.", filepath.Join(dir, "content")); r.code != 0 {
			t.Fatal(r)
		}
		if _, err := os.Stat(filepath.Join(dir, "content/sub/w")); err != nil {
			t.Error(err)
		}
	}
	f.setCopyOut(nil)
	if r := run("", "cp", "box:/no/such/file", dir); r.code != 3 || !strings.Contains(r.errOut, "/no/such/file") {
		t.Error(r)
	}
}

// A guest's tar stream is hostile: no link of it leads out of the target, and no
// device is made.
func TestCopyOutHostile(t *testing.T) {
	outside := t.TempDir()
	for name, hdrs := range map[string][]tar.Header{
		"link then file": {
			{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755},
			{Typeflag: tar.TypeSymlink, Name: "d/l", Linkname: outside},
			{Typeflag: tar.TypeReg, Name: "d/l/evil", Mode: 0o644},
		},
		"dots":     {{Typeflag: tar.TypeReg, Name: "../../../../../../" + outside + "/evil", Mode: 0o644}},
		"absolute": {{Typeflag: tar.TypeReg, Name: outside + "/evil", Mode: 0o644}},
		"hard link": {
			{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755},
			{Typeflag: tar.TypeLink, Name: "d/h", Linkname: "/etc/passwd"},
		},
		"device": {
			{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755},
			{Typeflag: tar.TypeChar, Name: "d/mem", Devmajor: 1, Devminor: 1, Mode: 0o666},
			{Typeflag: tar.TypeBlock, Name: "d/sda", Devmajor: 8, Mode: 0o666},
			{Typeflag: tar.TypeFifo, Name: "d/fifo", Mode: 0o666},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{copyOut: tarOf(t, hdrs...)}
			run := withVM(t, f)
			dir := t.TempDir()
			r := run("", "cp", "box:/d", filepath.Join(dir, "out"))
			t.Log(r)
			if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
				t.Fatalf("written outside of the target: %v %v", left, err)
			}
			must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				if d.Type()&(fs.ModeDevice|fs.ModeCharDevice|fs.ModeNamedPipe) != 0 {
					t.Errorf("%s is a %v", path, d.Type())
				}
				if passwd, _ := os.Stat("/etc/passwd"); d.Type().IsRegular() {
					if fi, _ := d.Info(); os.SameFile(fi, passwd) {
						t.Errorf("%s is /etc/passwd", path)
					}
				}
				return nil
			}))
		})
	}
}

func FuzzHarmless(f *testing.F) {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	_ = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: 1, Mode: 0o6777})
	_, _ = tw.Write([]byte("x"))
	_ = tw.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		_, r, err := harmless(io.NopCloser(bytes.NewReader(data)))
		if err != nil {
			return
		}
		defer r.Close()
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if err != nil {
				return
			}
			if h.Mode&^0o1777 != 0 {
				t.Fatalf("mode %o", h.Mode)
			}
			switch h.Typeflag {
			case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
			default:
				t.Fatalf("type %q", h.Typeflag)
			}
		}
	})
}
