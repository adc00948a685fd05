package api

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// clone answers with a line of JSON for each clone, as it becomes ready.
func (s *Server) clone(w http.ResponseWriter, r *http.Request) error {
	var req CloneRequest
	if err := decode(w, r, &req); err != nil {
		return err
	}
	flush := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	begun := false
	send := func(ev cloneEvent) {
		if !begun {
			begun = true
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		_ = enc.Encode(ev) // fails only when the client left; the context tells
		_ = flush.Flush()
	}
	err := s.backend.Clone(r.Context(), req, func(vm VM) { send(cloneEvent{VM: &vm}) })
	switch {
	case err == nil:
		send(cloneEvent{Done: true})
	case begun:
		send(cloneEvent{Error: toError(err)})
	default:
		return err
	}
	return nil
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request) error {
	if err := checkUpgrade(r); err != nil {
		return err
	}
	var req ExecRequest
	if err := decode(w, r, &req); err != nil {
		return err
	}
	st, err := s.backend.Exec(r.Context(), r.PathValue("name"), req)
	if err != nil {
		return err
	}
	return s.proxy(w, r, st)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) error {
	if err := checkUpgrade(r); err != nil {
		return err
	}
	var none struct{}
	if err := decode(w, r, &none); err != nil {
		return err
	}
	st, err := s.backend.Attach(r.Context(), r.PathValue("name"))
	if err != nil {
		return err
	}
	return s.proxy(w, r, st)
}

func checkUpgrade(r *http.Request) error {
	if r.Header.Get("Upgrade") != upgradeProto {
		return invalid("this request needs the header Upgrade: %s", upgradeProto)
	}
	return nil
}

// proxy turns the request's connection into a stream and copies between it and
// st until either side ends, or the server does. It closes both.
func (s *Server) proxy(w http.ResponseWriter, r *http.Request, st io.ReadWriteCloser) error {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = st.Close()
		return err
	}
	s.streams.Add(1)
	defer s.streams.Done()
	// The context outlives the hijack, and ends with the server.
	stop := context.AfterFunc(r.Context(), func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Time{})
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+upgradeProto+"\r\n\r\n")
	if err == nil {
		copyBoth(conn, buf.Reader, st)
	}
	_ = conn.Close()
	_ = st.Close()
	return nil
}

// copyBoth copies until one direction ends, closes both, and waits for the other.
func copyBoth(conn net.Conn, client io.Reader, st io.ReadWriteCloser) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(st, client)
		_ = st.Close()
	}()
	_, _ = io.Copy(conn, st)
	_ = conn.Close()
	<-done
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	req := LogsRequest{Tail: -1}
	var err error
	if req.Follow, err = boolParam(r, "follow"); err != nil {
		return err
	}
	if v := q.Get("tail"); v != "" {
		if req.Tail, err = strconv.Atoi(v); err != nil {
			return invalid("bad tail %q", v)
		}
	}
	if v := q.Get("since"); v != "" {
		if req.Since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			return invalid("bad since %q", v)
		}
	}
	begun := false
	err = s.backend.Logs(r.Context(), r.PathValue("name"), req, func() io.Writer {
		begun = true
		w.Header().Set("Content-Type", "application/octet-stream")
		return begin(w)
	})
	return ended(begun, err)
}

func (s *Server) copyOut(w http.ResponseWriter, r *http.Request) error {
	tar, err := s.backend.CopyOut(r.Context(), r.PathValue("name"), r.URL.Query().Get("path"))
	if err != nil {
		return err
	}
	defer tar.Close()
	w.Header().Set("Content-Type", "application/x-tar")
	_, err = io.Copy(begin(w), tar)
	return ended(true, err)
}

// ended breaks off an answer that has begun and failed, so that the client does
// not take what it has for all there is.
func ended(begun bool, err error) error {
	if begun && err != nil {
		panic(http.ErrAbortHandler)
	}
	return err
}

// begin sends the header and returns a writer that holds nothing back.
func begin(w http.ResponseWriter) io.Writer {
	w.WriteHeader(http.StatusOK)
	fw := &flushWriter{w: w, rc: http.NewResponseController(w)}
	_ = fw.rc.Flush()
	return fw
}

type flushWriter struct {
	w  io.Writer
	rc *http.ResponseController
}

func (f *flushWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}
