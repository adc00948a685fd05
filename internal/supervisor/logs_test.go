package supervisor

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
)

// readLog reads log records to the end of the stream.
func readLog(t testing.TB, r io.Reader) (out string, code int) {
	t.Helper()
	code = -1
	var text bytes.Buffer
	for lr := proto.NewLogReader(r); ; {
		rec, err := lr.Next()
		if errors.Is(err, io.EOF) {
			return text.String(), code
		}
		if err != nil {
			t.Fatal(err)
		}
		if rec.Stream == proto.Exit {
			code = rec.ExitCode
			continue
		}
		text.Write(rec.Data)
	}
}

func TestLogs(t *testing.T) {
	b := newBench(t)
	vm := b.run("vm", "sleep")
	v := b.engine.byID(t, vm.ID)
	old := time.Now().Add(-time.Hour)
	for _, r := range []proto.LogRecord{
		{Stream: proto.Stdout, Time: old, Data: []byte("one\ntw")},
		{Stream: proto.Stdout, Time: old, Data: []byte("o\n")},
		{Stream: proto.Stderr, Data: []byte("three\nfour\n")},
		{Stream: proto.Stdout, Data: []byte("five")},
	} {
		v.print(r)
	}
	for _, tt := range []struct {
		req  api.LogsRequest
		want string
	}{
		{api.LogsRequest{Tail: -1}, "one\ntwo\nthree\nfour\nfive"},
		{api.LogsRequest{Tail: 0}, ""},
		{api.LogsRequest{Tail: 1}, "five"},
		{api.LogsRequest{Tail: 2}, "four\nfive"},
		{api.LogsRequest{Tail: 4}, "two\nthree\nfour\nfive"},
		{api.LogsRequest{Tail: 99}, "one\ntwo\nthree\nfour\nfive"},
		{api.LogsRequest{Tail: -1, Since: old.Add(time.Minute)}, "three\nfour\nfive"},
		{api.LogsRequest{Tail: 2, Since: old.Add(time.Minute)}, "four\nfive"},
	} {
		if out, code := b.logs("vm", tt.req); out != tt.want || code != -1 {
			t.Errorf("logs %+v: %q, %d, want %q", tt.req, out, code, tt.want)
		}
	}

	// A follower gets what comes, up to the exit record, and then the end.
	r, err := b.c.Logs(t.Context(), "vm", api.LogsRequest{Follow: true, Tail: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	first := make([]byte, 1)
	if _, err := io.ReadFull(r, first); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		v.print(proto.LogRecord{Stream: proto.Stdout, Data: []byte("x\n")})
	}
	v.exit(4)
	out, code := readLog(t, io.MultiReader(bytes.NewReader(first), r))
	if out != "five"+strings.Repeat("x\n", 100) || code != 4 {
		t.Errorf("followed: %q, %d", out, code)
	}
}

// TestLogsOfACrash: without an exit record, the end of the VM ends the log.
func TestLogsOfACrash(t *testing.T) {
	b := newBench(t)
	vm := b.run("vm", "sleep")
	r, err := b.c.Logs(t.Context(), "vm", api.LogsRequest{Follow: true, Tail: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	v := b.engine.byID(t, vm.ID)
	v.print(proto.LogRecord{Stream: proto.Stdout, Data: []byte("last")})
	v.end()
	if out, code := readLog(t, r); out != "last" || code != -1 {
		t.Errorf("%q, %d", out, code)
	}
}
