package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
)

const hello = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\r\n"

// fakeQEMU answers each command by what script returns: raw lines. An empty
// answer means that it keeps silent.
func fakeQEMU(t *testing.T, script func(command string, id uint64) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		if _, err := theirs.Write([]byte(hello)); err != nil {
			return
		}
		s := bufio.NewScanner(theirs)
		for s.Scan() {
			var c struct {
				Execute string `json:"execute"`
				ID      uint64 `json:"id"`
			}
			if err := json.Unmarshal(s.Bytes(), &c); err != nil {
				t.Errorf("client sent %q: %v", s.Bytes(), err)
				return
			}
			out := fmt.Sprintf(`{"return": {}, "id": %d}`+"\r\n", c.ID)
			if c.Execute != "qmp_capabilities" {
				out = script(c.Execute, c.ID)
			}
			if out == "hang up" {
				return
			}
			if _, err := theirs.Write([]byte(out)); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { ours.Close(); <-done })
	return ours
}

func connect(t *testing.T, conn net.Conn, onEvent func(Event)) *Client {
	t.Helper()
	c, err := New(t.Context(), conn, onEvent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestAnswersErrorsAndEvents(t *testing.T) {
	events := make(chan Event, 1)
	c := connect(t, fakeQEMU(t, func(command string, id uint64) string {
		switch command {
		case "query-status":
			return fmt.Sprintf(`{"timestamp": {"seconds": 1}, "event": "RESUME"}`+"\n"+`{"return": {"status": "running"}, "id": %d}`+"\n", id)
		default:
			return fmt.Sprintf(`{"id": %d, "error": {"class": "CommandNotFound", "desc": "no such thing"}}`+"\n", id)
		}
	}), func(e Event) { events <- e })

	var status struct{ Status string }
	if err := c.Do(t.Context(), "query-status", nil, &status); err != nil || status.Status != "running" {
		t.Fatalf("status %+v, error %v", status, err)
	}
	if e := <-events; e.Name != "RESUME" {
		t.Errorf("event %q, want RESUME", e.Name)
	}
	var refused *Error
	if err := c.Do(t.Context(), "fly", nil, nil); !errors.As(err, &refused) || refused.Desc != "no such thing" || refused.Command != "fly" {
		t.Errorf("error %v, want QEMU's", err)
	}
}

// A QEMU that hangs costs one command its time; the late answer must not be
// taken for the next command's.
func TestLateAnswerIsDropped(t *testing.T) {
	var stuck uint64
	c := connect(t, fakeQEMU(t, func(command string, id uint64) string {
		if command == "stuck" {
			stuck = id
			return ""
		}
		return fmt.Sprintf(`{"return": "late", "id": %d}`+"\n"+`{"return": "right", "id": %d}`+"\n", stuck, id)
	}), nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	// Written before it is abandoned: the fake has no deadline to run into.
	id, answer, err := c.register()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.write(t.Context(), id, "stuck", nil); err != nil {
		t.Fatal(err)
	}
	c.forget(id)
	if err := c.Do(ctx, "never-sent", nil, nil); !errors.Is(err, why) {
		t.Errorf("error %v, want the context's cause", err)
	}
	var s string
	if err := c.Do(t.Context(), "next", nil, &s); err != nil || s != "right" {
		t.Errorf("answer %q, error %v, want right", s, err)
	}
	select {
	case m := <-answer:
		t.Errorf("abandoned command got %s", m.result)
	default:
	}
}

func TestHangUpFailsAllCommands(t *testing.T) {
	c := connect(t, fakeQEMU(t, func(string, uint64) string { return "hang up" }), nil)
	for range 2 {
		if err := c.Do(t.Context(), "stop", nil, nil); !errors.Is(err, ErrClosed) {
			t.Errorf("error %v, want ErrClosed", err)
		}
	}
	<-c.Done()
}

func TestGarbageEndsTheConnection(t *testing.T) {
	for name, line := range map[string]string{
		"not JSON": "Segmentation fault\n",
		"nothing":  "{}\n",
		"too long": `{"return": "` + strings.Repeat("x", MaxLine) + `"}` + "\n",
		"wrong id": `{"return": {}, "id": "one"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, fakeQEMU(t, func(string, uint64) string { return line }), nil)
			if err := c.Do(t.Context(), "stop", nil, nil); !errors.Is(err, ErrClosed) {
				t.Errorf("error %v, want ErrClosed", err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(hello))
	f.Add([]byte(`{"return": {}, "id": 1}`))
	f.Add([]byte(`{"id": 2, "error": {"class": "GenericError", "desc": "no"}}`))
	f.Add([]byte(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP", "data": {}}`))
	f.Add([]byte(`{"return": null}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parse(line)
		if (err == nil) != (m.kind >= greeting && m.kind <= event) {
			t.Fatalf("kind %d with error %v", m.kind, err)
		}
		if err == nil && m.kind == reply && !json.Valid(m.result) {
			t.Fatalf("result %q is no JSON", m.result)
		}
	})
}
