package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/vmm/qemu/qmp"
)

// floor is what no clone that is started when it is asked for can be faster than:
// QEMU alone, with the command line that fcvm gives it, its memory mapped from the
// snapshot's memory file, until the guest runs. No supervisor, no page server, no
// tracing, no identity, no word with the guest's agent.
func (b *bench) floor(ctx context.Context, snapshot string) (*bare, error) {
	// The command line is that of a clone, so that it can't differ by mistake.
	const name = "floor"
	if _, err := b.FCVM(ctx, "clone", "--snapshot", snapshot, "--name", name); err != nil {
		return nil, err
	}
	out, err := b.FCVM(ctx, "inspect", name)
	if err != nil {
		return nil, err
	}
	var vm api.VM
	if err := json.Unmarshal([]byte(out), &vm); err != nil {
		return nil, fmt.Errorf("inspect %s: %w", name, err)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", vm.PID))
	if err != nil {
		return nil, err
	}
	if _, err := b.FCVM(ctx, "rm", "-f", name); err != nil {
		return nil, err
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	dir, err := os.MkdirTemp(b.Dir, "floor")
	if err != nil {
		return nil, err
	}
	return newBare(args, dir, filepath.Join(b.Data(), "snapshots", snapshot))
}

// times measures it n times. The QEMUs live on, as clones do, until end.
func (q *bare) times(ctx context.Context, n int) ([]time.Duration, error) {
	var all []time.Duration
	for range n {
		d, err := q.start(ctx)
		if err != nil {
			return nil, fmt.Errorf("floor: %w", err)
		}
		all = append(all, d)
	}
	return all, nil
}

// end ends all QEMUs that were started.
func (q *bare) end() {
	for _, stop := range q.alive {
		stop()
	}
	q.alive = nil
}

// bare is a QEMU that loads a snapshot.
type bare struct {
	dir, state string
	args       []string
	// The numbers that the command line gives to descriptors.
	qmpFD, agentFD, stateFD int
	alive                   []func()
}

var (
	qmpArg   = regexp.MustCompile(`^socket,id=qmp,.*fd=(\d+)`)
	agentArg = regexp.MustCompile(`^socket,id=agent,.*fd=(\d+)`)
	stateArg = regexp.MustCompile(`^fd:(\d+)$`)
)

// newBare takes the command line of a clone and changes where its memory comes
// from and its logs go.
func newBare(args []string, dir, snapshot string) (*bare, error) {
	q := &bare{dir: dir, state: filepath.Join(snapshot, "state.bin")}
	for _, a := range args {
		for re, fd := range map[*regexp.Regexp]*int{qmpArg: &q.qmpFD, agentArg: &q.agentFD, stateArg: &q.stateFD} {
			if m := re.FindStringSubmatch(a); m != nil {
				n, err := strconv.Atoi(m[1])
				if err != nil || n > 100 {
					return nil, fmt.Errorf("QEMU was given %q", a)
				}
				*fd = n
			}
		}
		switch {
		case agentArg.MatchString(a):
			// Nobody connects here.
			a = strings.Replace(a, ",wait=on", ",wait=off", 1)
		case strings.HasPrefix(a, "memory-backend-ram,id=ram,"):
			a = "memory-backend-file,share=off,mem-path=" + filepath.Join(snapshot, "mem.img") + strings.TrimPrefix(a, "memory-backend-ram")
		case strings.HasPrefix(a, "file,id=console,"), strings.HasPrefix(a, "file,id=log,"):
			id, _, _ := strings.Cut(strings.TrimPrefix(a, "file,"), ",")
			a = "null," + id
		}
		q.args = append(q.args, a)
	}
	if q.qmpFD < 3 || q.agentFD < 3 || q.stateFD < 3 {
		return nil, fmt.Errorf("QEMU's command line is not as expected: %q", args)
	}
	return q, nil
}

// start starts QEMU and waits until the guest runs.
func (q *bare) start(ctx context.Context) (_ time.Duration, err error) {
	qmpL, addr, err := q.listen("qmp.sock")
	if err != nil {
		return 0, err
	}
	defer qmpL.Close()
	agentL, _, err := q.listen("agent.sock")
	if err != nil {
		return 0, err
	}
	defer agentL.Close()
	state, err := os.Open(q.state)
	if err != nil {
		return 0, err
	}
	defer state.Close()

	cmd := exec.Command(q.args[0], q.args[1:]...)
	cmd.ExtraFiles = make([]*os.File, max(q.qmpFD, q.agentFD, q.stateFD)-2)
	cmd.ExtraFiles[q.qmpFD-3], cmd.ExtraFiles[q.agentFD-3], cmd.ExtraFiles[q.stateFD-3] = qmpL, agentL, state
	var said strings.Builder
	cmd.Stderr = &said
	conn, err := net.Dial("unix", addr)
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, errors.Join(err, conn.Close())
	}
	kill := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // "signal: killed"
		_ = conn.Close()
	}
	defer func() {
		if err != nil {
			kill()
			err = fmt.Errorf("bare QEMU: %w: %s", err, said.String())
		}
	}()
	resumed := make(chan struct{}, 1)
	client, err := qmp.New(ctx, conn, func(e qmp.Event) {
		if e.Name == "RESUME" {
			select {
			case resumed <- struct{}{}:
			default:
			}
		}
	})
	if err != nil {
		return 0, err
	}
	var s struct {
		Status string `json:"status"`
	}
	if err := client.Do(ctx, "query-status", nil, &s); err != nil {
		return 0, err
	}
	if s.Status != "running" {
		select {
		case <-resumed:
		case <-client.Done():
			return 0, fmt.Errorf("it ended while it was %s", s.Status)
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	took := time.Since(begun)
	q.alive = append(q.alive, kill)
	return took, nil
}

// listen makes a listening socket for QEMU. The path is removed when the file is
// closed.
func (q *bare) listen(name string) (*os.File, string, error) {
	path := filepath.Join(q.dir, name)
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, "", err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, "", err
	}
	// QEMU gets a copy of the descriptor, and removes nothing.
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, path, errors.Join(err, l.Close())
}
