package supervisor

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/guest"
	"fcvm/internal/guest/proto"
	"fcvm/internal/vmm"
)

func TestRunStopRemove(t *testing.T) {
	b := newBench(t)
	vm := b.run("web", "sleep")
	if vm.State != api.StateRunning || vm.Hostname != "web" || vm.PID == 0 || vm.Started == nil {
		t.Errorf("after run: %+v", vm)
	}
	if !b.images.leased(t) {
		t.Error("the image of a VM that runs is not leased")
	}
	for _, name := range []string{"web", vm.ID, vm.ID[:4]} {
		if got, err := b.c.Get(t.Context(), name); err != nil || got.ID != vm.ID {
			t.Errorf("get %q: %v, %v", name, got.ID, err)
		}
	}
	wantCode(t, b.c.Remove(t.Context(), "web", false), api.CodeConflict)
	if err := b.c.Stop(t.Context(), "web", time.Minute); err != nil {
		t.Fatal(err)
	}
	got, err := b.c.Wait(t.Context(), "web")
	if err != nil || got.State != api.StateExited || got.ExitCode != 143 || got.PID != 0 || got.Error != "" {
		t.Errorf("after stop: %+v, %v", got, err)
	}
	if err := b.c.Stop(t.Context(), "web", time.Minute); err != nil {
		t.Errorf("second stop: %v", err)
	}
	if b.images.leased(t) {
		t.Error("the image of an ended VM is leased")
	}
	b.clean(vm)
	if err := b.c.Remove(t.Context(), "web", false); err != nil {
		t.Fatal(err)
	}
	_, err = b.c.Get(t.Context(), "web")
	wantCode(t, err, api.CodeNotFound)
	b.clean()
}

func TestStopKillsTheDeaf(t *testing.T) {
	b := newBench(t)
	b.run("deaf", "deaf")
	if err := b.c.Stop(t.Context(), "deaf", 0); err != nil {
		t.Fatal(err)
	}
	if vm, err := b.c.Wait(t.Context(), "deaf"); err != nil || vm.ExitCode != 137 || vm.Error != "" {
		t.Errorf("exit code %d, error %q, %v", vm.ExitCode, vm.Error, err)
	}
}

func TestStopSendsTheImagesSignal(t *testing.T) {
	b := newBench(t)
	b.images.cfg.StopSignal = "SIGQUIT"
	b.run("web", "sleep")
	if err := b.c.Stop(t.Context(), "web", time.Minute); err != nil {
		t.Fatal(err)
	}
	if vm, err := b.c.Wait(t.Context(), "web"); err != nil || vm.ExitCode != 128+3 {
		t.Errorf("exit code %d, %v", vm.ExitCode, err)
	}
}

func TestStopOfAPausedVM(t *testing.T) {
	b := newBench(t)
	b.run("web", "sleep")
	if err := b.c.Pause(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, b.c.Pause(t.Context(), "web"), api.CodeState)
	_, err := b.c.Exec(t.Context(), "web", api.ExecRequest{Command: []string{"true"}})
	wantCode(t, err, api.CodeState)
	if err := b.c.Stop(t.Context(), "web", time.Minute); err != nil {
		t.Fatal(err)
	}
	if vm, err := b.c.Wait(t.Context(), "web"); err != nil || vm.ExitCode != 143 {
		t.Errorf("exit code %d, %v", vm.ExitCode, err)
	}
}

func TestPauseResume(t *testing.T) {
	b := newBench(t)
	vm := b.run("web", "sleep")
	wantCode(t, b.c.Resume(t.Context(), "web"), api.CodeState)
	if err := b.c.Pause(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if !b.engine.byID(t, vm.ID).isPaused() {
		t.Error("not paused")
	}
	resumed := time.Now()
	if err := b.c.Resume(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if out, code := b.exec("web", "echo"); out != "echo|" || code != 5 {
		t.Errorf("exec after resume: %q, %d", out, code)
	}
	if wall := b.engine.byID(t, vm.ID).who().Wall; wall.Before(resumed) {
		t.Errorf("the guest's clock was set to %v, want a time after %v, when it went on", wall, resumed)
	}
	b.clean(vm)
}

// A pause may cost the connection to the agent; the clock is set by the next one.
func TestResumeEndsConnection(t *testing.T) {
	b := newBench(t)
	vm := b.run("web", "sleep")
	if err := b.c.Pause(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	tries := 0
	b.engine.setHook(func(step string, v *fakeVM) error {
		if step != string(proto.MethodClock) {
			return nil
		}
		if tries++; tries == 1 {
			v.hangUp()
		}
		return nil
	})
	resumed := time.Now()
	if err := b.c.Resume(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if wall := b.engine.byID(t, vm.ID).who().Wall; tries != 2 || wall.Before(resumed) {
		t.Errorf("in %d tries the guest's clock was set to %v, want 2 and a time after %v", tries, wall, resumed)
	}
	b.clean(vm)
}

func (b *bench) exec(name string, cmd ...string) (string, int) {
	b.t.Helper()
	st, err := b.c.Exec(b.t.Context(), name, api.ExecRequest{Command: cmd})
	if err != nil {
		b.t.Fatal(err)
	}
	defer st.Close()
	return readFrames(b.t, st)
}

func TestExitCode(t *testing.T) {
	b := newBench(t)
	vm := b.run("short", "exit", "7")
	got, err := b.c.Wait(t.Context(), "short")
	if err != nil || got.ExitCode != 7 || got.Error != "" || got.Finished == nil {
		t.Errorf("%+v, %v", got, err)
	}
	if out, code := b.logs("short", api.LogsRequest{Tail: -1}); out != "bye\n" || code != 7 {
		t.Errorf("logs %q, exit record %d", out, code)
	}
	b.clean(vm)
}

// TestExitBeforeTheAnswer: a process that ends at once may take the VM with it
// before the agent has answered the request that started it.
func TestExitBeforeTheAnswer(t *testing.T) {
	b := newBench(t)
	b.run("short", "exit-unanswered")
	if got, err := b.c.Wait(t.Context(), "short"); err != nil || got.ExitCode != 3 || got.Error != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestCrashTellsTheEndOfTheConsole(t *testing.T) {
	b := newBench(t)
	vm := b.run("c", "sleep")
	b.engine.byID(t, vm.ID).end()
	got, err := b.c.Wait(t.Context(), "c")
	if err != nil || !strings.Contains(got.Error, "last words") {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRunFailuresLeaveNothing(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name string
		set  func(b *bench, req *api.RunRequest)
		code api.Code
		want string
	}{
		{"engine unavailable", func(b *bench, _ *api.RunRequest) { b.engine.failAt("info", vmm.ErrUnavailable) }, api.CodeUnavailable, ""},
		{"unknown engine", func(_ *bench, r *api.RunRequest) { r.Engine = "bochs" }, api.CodeUnavailable, "bochs"},
		{"no guest", func(b *bench, _ *api.RunRequest) { b.guest = guest.ErrNotSetUp }, api.CodeUnavailable, ""},
		{"no kernel", func(_ *bench, r *api.RunRequest) { r.Kernel = "/no/such/kernel" }, api.CodeInvalid, "/no/such/kernel"},
		{"no image", func(_ *bench, r *api.RunRequest) { r.ImageID = "nosuch" }, api.CodeNotFound, "nosuch"},
		{"no command", func(_ *bench, r *api.RunRequest) { r.Command = nil }, api.CodeInvalid, "command"},
		{"boot", func(b *bench, _ *api.RunRequest) { b.engine.failAt("boot", boom) }, api.CodeInternal, "boom"},
		{"dial", func(b *bench, _ *api.RunRequest) { b.engine.failAt("dial", boom) }, api.CodeInternal, "boom"},
		{"start", func(b *bench, _ *api.RunRequest) { b.engine.failAt("start", boom) }, api.CodeInvalid, "boom"},
		{"crash", func(b *bench, _ *api.RunRequest) {
			b.engine.setHook(func(s string, v *fakeVM) error {
				if s == "dial" {
					v.end()
				}
				return nil
			})
		}, api.CodeUnavailable, "last words"},
		{"bad name", func(_ *bench, r *api.RunRequest) { r.Name = "no good" }, api.CodeInvalid, "no good"},
		{"long name", func(_ *bench, r *api.RunRequest) { r.Name = strings.Repeat("a", 64) }, api.CodeInvalid, "63"},
		{"memory", func(_ *bench, r *api.RunRequest) { r.MemoryBytes = 1 << 20 }, api.CodeInvalid, ""},
		{"cpus", func(_ *bench, r *api.RunRequest) { r.CPUs = 1.5 }, api.CodeInvalid, "1.5"},
		{"env", func(_ *bench, r *api.RunRequest) { r.Env = []string{"=x"} }, api.CodeInvalid, "=x"},
		{"port", func(_ *bench, r *api.RunRequest) { r.Ports = []vmm.Port{{GuestPort: 99999, Proto: "tcp"}} }, api.CodeInvalid, "99999"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			req := api.RunRequest{Name: "vm", Image: "img", ImageID: "img", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1}
			tt.set(b, &req)
			_, err := b.c.Run(t.Context(), req)
			e := apiError(t, err, tt.code)
			if !strings.Contains(e.Message, tt.want) {
				t.Errorf("message %q does not say %q", e.Message, tt.want)
			}
			b.clean()
			b.engine.setHook(nil)
			if b.guest == nil {
				b.run("vm", "sleep") // the name is free again
			}
		})
	}
}

func TestCommandNotFound(t *testing.T) {
	b := newBench(t)
	_, err := b.c.Run(t.Context(), api.RunRequest{Image: "img", ImageID: "img", Command: []string{"nosuch"}, MemoryBytes: testMemory, CPUs: 1})
	if e := apiError(t, err, api.CodeInvalid); e.ExitCode != 127 || e.Message != "nosuch: not found" {
		t.Errorf("%+v", e)
	}
	b.clean()
}

// TestBootTimeout: the VM runs, and nothing in it ever answers.
func TestBootTimeout(t *testing.T) {
	b := idleBench(t)
	silent := &silentEngine{fakeEngine: b.engine}
	b.options = func(o *Options) { o.Engines = []vmm.Named{{Name: "fake", Engine: silent}} }
	b.start()
	_, err := b.c.Run(t.Context(), api.RunRequest{
		Image: "img", ImageID: "img", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1, BootTimeout: 0.05,
	})
	e := apiError(t, err, api.CodeUnavailable)
	if !strings.Contains(e.Message, "did not boot") || !strings.Contains(e.Message, "last words") {
		t.Errorf("message: %s", e.Message)
	}
	b.clean()
}

// silentEngine's guests read what they are sent, and say nothing.
type silentEngine struct{ *fakeEngine }

type silentVM struct{ *fakeVM }

func (e *silentEngine) Boot(ctx context.Context, c vmm.BootConfig) (vmm.VM, error) {
	v, err := e.fakeEngine.Boot(ctx, c)
	if err != nil {
		return nil, err
	}
	return &silentVM{v.(*fakeVM)}, nil
}

func (v *silentVM) DialAgent(context.Context) (net.Conn, error) {
	host, guest := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, guest) }()
	return host, nil
}

// TestRunCalledOff: a client that goes away, and a VM that is removed, while the
// VM boots.
func TestRunCalledOff(t *testing.T) {
	b := idleBench(t)
	silent := &silentEngine{fakeEngine: b.engine}
	b.options = func(o *Options) { o.Engines = []vmm.Named{{Name: "fake", Engine: silent}} }
	b.start()
	req := api.RunRequest{Name: "vm", Image: "img", ImageID: "img", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1}
	waitBooting := func() {
		for len(b.engine.running()) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() { _, err := b.c.Run(ctx, req); got <- err }()
	waitBooting()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("run: %v", err)
	}
	// The supervisor may need a moment to see that the client has gone.
	for {
		if list, err := b.c.List(t.Context()); err != nil {
			t.Fatal(err)
		} else if len(list) == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	b.clean()

	go func() { _, err := b.c.Run(t.Context(), req); got <- err }()
	waitBooting()
	_, err := b.c.Exec(t.Context(), "vm", api.ExecRequest{Command: []string{"true"}})
	wantCode(t, err, api.CodeState)
	if err := b.c.Remove(t.Context(), "vm", true); err != nil {
		t.Error(err)
	}
	wantCode(t, <-got, api.CodeState)
	b.clean()
}

func TestNames(t *testing.T) {
	b := newBench(t)
	one := b.run("taken", "sleep")
	_, err := b.c.Run(t.Context(), api.RunRequest{Name: "taken", Image: "i", ImageID: "i", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1})
	e := apiError(t, err, api.CodeConflict)
	if !strings.Contains(e.Message, "taken") || e.Hint == "" {
		t.Errorf("%+v", e)
	}
	two := b.run("", "sleep")
	if err := checkName(two.Name); err != nil || !strings.Contains(two.Name, "-") {
		t.Errorf("generated name %q: %v", two.Name, err)
	}
	list, err := b.c.List(t.Context())
	if err != nil || len(list) != 2 || list[0].ID != one.ID || list[1].ID != two.ID {
		t.Errorf("list: %v, %v", list, err)
	}
	b.clean(one, two)
}

func TestAutoRemove(t *testing.T) {
	b := newBench(t)
	vm, err := b.c.Run(t.Context(), api.RunRequest{
		Image: "img", ImageID: "img", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1, AutoRemove: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.c.Logs(t.Context(), vm.Name, api.LogsRequest{Follow: true, Tail: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b.engine.byID(t, vm.ID).exit(9)
	if _, code := readLog(t, r); code != 9 {
		t.Errorf("exit record %d", code)
	}
	// As the CLI does: the exit code after the log's end, and then nothing is left.
	got, err := b.c.Wait(t.Context(), vm.Name)
	if err != nil || got.ExitCode != 9 {
		t.Errorf("wait: %+v, %v", got, err)
	}
	b.clean()
}

// TestAutoRemoveWithNobodyWaiting needs no wait: a detached VM that ends later
// than its start is removed at once.
func TestAutoRemoveWithNobodyWaiting(t *testing.T) {
	b := newBench(t)
	vm, err := b.c.Run(t.Context(), api.RunRequest{
		Image: "img", ImageID: "img", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1, AutoRemove: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	b.engine.byID(t, vm.ID).exit(0)
	for {
		if _, err := b.c.Get(t.Context(), vm.ID); err != nil {
			wantCode(t, err, api.CodeNotFound)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.clean()
}

func TestPorts(t *testing.T) {
	b := newBench(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	run := func(name string, port int) (api.VM, error) {
		return b.c.Run(t.Context(), api.RunRequest{
			Name: name, Image: "i", ImageID: "i", Command: []string{"sleep"}, MemoryBytes: testMemory, CPUs: 1,
			Ports: []vmm.Port{{HostIP: "127.0.0.1", HostPort: port, GuestPort: 80, Proto: "tcp"}},
		})
	}
	_, err = run("foreign", l.Addr().(*net.TCPAddr).Port)
	if e := apiError(t, err, api.CodeConflict); !strings.Contains(e.Message, l.Addr().String()) {
		t.Errorf("message does not name the port: %s", e.Message)
	}
	b.clean()
	one, err := run("one", 0)
	if err != nil || one.Ports[0].HostPort == 0 {
		t.Fatalf("%+v, %v", one.Ports, err)
	}
	_, err = run("two", one.Ports[0].HostPort)
	if e := apiError(t, err, api.CodeConflict); !strings.Contains(e.Message, "VM one") {
		t.Errorf("message does not name the VM: %s", e.Message)
	}
	b.clean(one)
	// A restarted supervisor still knows.
	b.restart()
	_, err = run("two", one.Ports[0].HostPort)
	wantCode(t, err, api.CodeConflict)
	if err := b.c.Remove(t.Context(), "one", true); err != nil {
		t.Fatal(err)
	}
	if _, err = run("two", one.Ports[0].HostPort); err != nil {
		t.Errorf("port of a VM that was removed: %v", err)
	}
}

func TestKill(t *testing.T) {
	b := newBench(t)
	for _, tt := range []struct {
		signal string
		code   int
	}{{"USR1", 138}, {"SIGHUP", 129}, {"15", 143}, {"KILL", 137}, {"", 137}} {
		vm := b.run("vm", "sleep")
		if err := b.c.Kill(t.Context(), vm.ID, tt.signal); err != nil {
			t.Fatalf("kill -s %q: %v", tt.signal, err)
		}
		got, err := b.c.Wait(t.Context(), "vm")
		if err != nil || got.ExitCode != tt.code {
			t.Errorf("kill -s %q: exit code %d, %v", tt.signal, got.ExitCode, err)
		}
		wantCode(t, b.c.Kill(t.Context(), "vm", tt.signal), api.CodeState)
		if err := b.c.Remove(t.Context(), "vm", false); err != nil {
			t.Fatal(err)
		}
	}
	b.run("vm", "sleep")
	for _, s := range []string{"NOSUCH", "0", "65", "-1"} {
		wantCode(t, b.c.Kill(t.Context(), "vm", s), api.CodeInvalid)
	}
}

func TestExecAndAttach(t *testing.T) {
	b := newBench(t)
	b.run("vm", "sleep")
	for range 3 {
		if out, code := b.exec("vm", "echo", "a"); out != "echo a|" || code != 5 {
			t.Errorf("exec: %q, %d", out, code)
		}
	}
	_, err := b.c.Exec(t.Context(), "vm", api.ExecRequest{})
	wantCode(t, err, api.CodeInvalid)
	st, err := b.c.Attach(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := proto.WriteFrame(st, proto.FrameStdin, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	f, err := proto.ReadFrame(st, nil)
	if err != nil || f.Type != proto.FrameStdout || string(f.Payload) != "hello" {
		t.Errorf("attach: %v, %v", f, err)
	}
}

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"A=1", "B=2"}, []string{"B=3", "C=4", "C=5"})
	if want := []string{"A=1", "B=3", "C=5"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
