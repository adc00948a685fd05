package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Client talks to one supervisor. Its methods may be called concurrently. Every
// error that the supervisor answered with is an *[Error].
//
// As long as a client is open, a supervisor that was started on demand stays.
type Client struct {
	http *http.Client
	info ServerInfo
}

// NewClient returns a client whose connections dial makes. Most callers want
// [Dial].
func NewClient(dial func(ctx context.Context) (net.Conn, error)) *Client {
	return &Client{http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		// No proxy: the host part of the URL is a placeholder.
		DisableCompression: true,
	}}}
}

// Close closes idle connections. Streams that are open stay open.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Server is what the supervisor said of itself when it was dialled.
func (c *Client) Server() ServerInfo { return c.info }

// Info asks the supervisor what it is.
func (c *Client) Info(ctx context.Context) (ServerInfo, error) {
	var info ServerInfo
	err := c.call(ctx, http.MethodGet, pathInfo, nil, nil, &info)
	return info, err
}

// Run starts a VM and returns when the container's process was started in it.
func (c *Client) Run(ctx context.Context, req RunRequest) (VM, error) {
	var vm VM
	err := c.call(ctx, http.MethodPost, pathVMs, nil, req, &vm)
	return vm, err
}

// Clone starts clones of a snapshot and calls ready, when not nil, for each as
// soon as it is ready. It returns all of them when the last is. On an error no
// clone of this request is left.
func (c *Client) Clone(ctx context.Context, req CloneRequest, ready func(VM)) ([]VM, error) {
	resp, err := c.do(ctx, http.MethodPost, pathClones, nil, req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var vms []VM
	for dec := json.NewDecoder(resp.Body); ; {
		var ev cloneEvent
		if err := dec.Decode(&ev); err != nil {
			return nil, lost(ctx, err)
		}
		switch {
		case ev.Error != nil:
			return nil, ev.Error
		case ev.Done:
			return vms, nil
		case ev.VM != nil:
			vms = append(vms, *ev.VM)
			if ready != nil {
				ready(*ev.VM)
			}
		}
	}
}

// List returns all VMs, those that exited too, oldest first.
func (c *Client) List(ctx context.Context) ([]VM, error) {
	var l vmList
	err := c.call(ctx, http.MethodGet, pathVMs, nil, nil, &l)
	return l.VMs, err
}

// Get returns the VM with this name, ID or unambiguous beginning of an ID. The
// same goes for the name that every other method takes.
func (c *Client) Get(ctx context.Context, name string) (VM, error) {
	var vm VM
	err := c.call(ctx, http.MethodGet, vmPath(name, ""), nil, nil, &vm)
	return vm, err
}

// Stop sends the image's stop signal, waits for at most timeout, then kills. It
// returns when the VM has exited. One that has already is no error.
func (c *Client) Stop(ctx context.Context, name string, timeout time.Duration) error {
	q := url.Values{"timeout": {timeout.String()}}
	return c.call(ctx, http.MethodPost, vmPath(name, "stop"), q, nil, nil)
}

// Kill sends a signal ("KILL", "SIGHUP", "9") to the container's process.
// SIGKILL ends the VM even when its guest no longer answers.
func (c *Client) Kill(ctx context.Context, name, signal string) error {
	return c.call(ctx, http.MethodPost, vmPath(name, "kill"), url.Values{"signal": {signal}}, nil, nil)
}

// Remove removes an exited VM; with force one that runs, too.
func (c *Client) Remove(ctx context.Context, name string, force bool) error {
	q := url.Values{"force": {strconv.FormatBool(force)}}
	return c.call(ctx, http.MethodDelete, vmPath(name, ""), q, nil, nil)
}

// Wait waits until the VM has exited and returns it.
func (c *Client) Wait(ctx context.Context, name string) (VM, error) {
	var vm VM
	err := c.call(ctx, http.MethodPost, vmPath(name, "wait"), nil, nil, &vm)
	return vm, err
}

// Pause stops the VM's CPUs.
func (c *Client) Pause(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodPost, vmPath(name, "pause"), nil, nil, nil)
}

// Resume lets a paused VM go on.
func (c *Client) Resume(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodPost, vmPath(name, "resume"), nil, nil, nil)
}

// Exec starts a process in a VM. The stream carries frames of
// internal/guest/proto: stdin, stdin EOF, resize and signal frames go in;
// stdout, stderr, then exit or error come out. The process could be started
// when Exec returns without an error. The stream is closed when ctx ends.
func (c *Client) Exec(ctx context.Context, name string, req ExecRequest) (io.ReadWriteCloser, error) {
	return c.upgrade(ctx, vmPath(name, "exec"), req)
}

// Attach connects to the container's own process: frames as in [Client.Exec].
// What the process printed before is in its logs.
func (c *Client) Attach(ctx context.Context, name string) (io.ReadWriteCloser, error) {
	return c.upgrade(ctx, vmPath(name, "attach"), nil)
}

// Logs streams what the container printed, as the records of
// internal/guest/proto (read them with proto.NewLogReader: stream, time, data).
// With Follow the stream ends after the exit record, or when the VM is gone.
func (c *Client) Logs(ctx context.Context, name string, req LogsRequest) (io.ReadCloser, error) {
	q := url.Values{"follow": {strconv.FormatBool(req.Follow)}, "tail": {strconv.Itoa(req.Tail)}}
	if !req.Since.IsZero() {
		q.Set("since", req.Since.Format(time.RFC3339Nano))
	}
	resp, err := c.do(ctx, http.MethodGet, vmPath(name, "logs"), q, nil)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// CopyIn unpacks a tar stream at a path in the guest, as docker cp does.
func (c *Client) CopyIn(ctx context.Context, name, path string, tar io.Reader) error {
	resp, err := c.send(ctx, http.MethodPut, vmPath(name, "files"), url.Values{"path": {path}}, tar)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// CopyOut returns a path of the guest as a tar stream, as docker cp does.
func (c *Client) CopyOut(ctx context.Context, name, path string) (io.ReadCloser, error) {
	resp, err := c.do(ctx, http.MethodGet, vmPath(name, "files"), url.Values{"path": {path}}, nil)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// Stats measures what all running VMs hold.
func (c *Client) Stats(ctx context.Context) (Stats, error) { return c.stats(ctx, "") }

// VMStats measures what one VM holds; nil when it does not run.
func (c *Client) VMStats(ctx context.Context, name string) (*VMStats, error) {
	s, err := c.stats(ctx, name)
	if err != nil || len(s.VMs) == 0 {
		return nil, err
	}
	return &s.VMs[0], nil
}

func (c *Client) stats(ctx context.Context, name string) (Stats, error) {
	var s Stats
	q := url.Values{}
	if name != "" {
		q.Set("vm", name)
	}
	err := c.call(ctx, http.MethodGet, pathStats, q, nil, &s)
	return s, err
}

// Metrics returns the supervisor's metrics in Prometheus' text format.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	resp, err := c.do(ctx, http.MethodGet, pathMetrics, nil, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, lost(ctx, err)
	}
	return b, nil
}

// MemoryMap tells what a running or paused VM has of each page of its memory.
func (c *Client) MemoryMap(ctx context.Context, name string) (MemoryMap, error) {
	var m MemoryMap
	err := c.call(ctx, http.MethodGet, vmPath(name, "memory"), nil, nil, &m)
	return m, err
}

// Snapshot makes a snapshot of a running or paused VM.
func (c *Client) Snapshot(ctx context.Context, req SnapshotRequest) (SnapshotResult, error) {
	var res SnapshotResult
	err := c.call(ctx, http.MethodPost, pathSnapshots, nil, req, &res)
	return res, err
}

// call sends a request and decodes the answer into out, when not nil.
func (c *Client) call(ctx context.Context, method, path string, q url.Values, in, out any) error {
	resp, err := c.do(ctx, method, path, q, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		_, err = io.Copy(io.Discard, resp.Body)
	} else {
		err = json.NewDecoder(resp.Body).Decode(out)
	}
	if err != nil {
		return lost(ctx, err)
	}
	return nil
}

func (c *Client) do(ctx context.Context, method, path string, q url.Values, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	return c.send(ctx, method, path, q, body)
}

func (c *Client) send(ctx context.Context, method, path string, q url.Values, body io.Reader) (*http.Response, error) {
	if path == "" {
		return nil, errNoName()
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://fcvm"+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	req.URL.RawQuery = q.Encode()
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, lost(ctx, err)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		defer resp.Body.Close()
		return nil, decodeError(resp)
	}
	return resp, nil
}

func (c *Client) upgrade(ctx context.Context, path string, in any) (io.ReadWriteCloser, error) {
	if path == "" {
		return nil, errNoName()
	}
	b, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://fcvm"+path, bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", upgradeProto)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, lost(ctx, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return nil, decodeError(resp)
	}
	rwc, ok := resp.Body.(io.ReadWriteCloser)
	if !ok {
		_ = resp.Body.Close()
		return nil, errors.New("open stream: the connection cannot be written to")
	}
	s := &stream{ReadWriteCloser: rwc}
	s.stop = context.AfterFunc(ctx, func() { _ = rwc.Close() })
	return s, nil
}

func errNoName() error {
	return &Error{Code: CodeNotFound, Message: "no such VM: the name is empty, . or ..", Hint: "`fcvm ls -a` lists them"}
}

// stream is a connection that ends with its context.
type stream struct {
	io.ReadWriteCloser
	stop func() bool
}

func (s *stream) Close() error {
	s.stop()
	return s.ReadWriteCloser.Close()
}

func decodeError(resp *http.Response) error {
	var e Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&e); err != nil || e.Message == "" {
		return &Error{Code: CodeInternal, Message: fmt.Sprintf("supervisor answered %s", resp.Status)}
	}
	return &e
}

// lost says that the connection broke off, unless it was the caller who left.
func lost(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return &Error{
		Code:    CodeUnavailable,
		Message: fmt.Sprintf("lost the supervisor: %v", err),
		Hint:    "its log is serve.log in the data directory; VMs run on",
	}
}
