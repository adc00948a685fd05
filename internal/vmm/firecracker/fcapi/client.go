// Package fcapi speaks Firecracker's API: HTTP with JSON over the unix socket
// that Firecracker's --api-sock names.
//
// A [Client] knows the version of its Firecracker, and sends it no field that it
// does not know: it would refuse the whole request. Firecracker carries out one
// request at a time. A load that fails ends Firecracker; its own words are then
// in the error, and at length in its log.
package fcapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

var (
	// ErrClosed means that nobody answers on the socket: Firecracker has ended, or
	// ended before it answered, or does not listen yet.
	ErrClosed = errors.New("firecracker ended")
	// ErrUnsupported means that this version of Firecracker cannot do it.
	ErrUnsupported = errors.New("not supported by this Firecracker")
)

// Timeout bounds requests whose context has no deadline.
const Timeout = 30 * time.Second

// maxAnswer bounds an answer, in bytes. The longest, the balloon's statistics,
// has under 1 KiB.
const maxAnswer = 1 << 20

// Error is a request that Firecracker refused.
type Error struct {
	Method, Path string
	// Status is HTTP's: 400 for everything that is the request's fault.
	Status int
	// Fault is Firecracker's own word (fault_message).
	Fault string
}

// Error implements error.
func (e *Error) Error() string {
	s := fmt.Sprintf("firecracker refused %s %s: %s", e.Method, e.Path, e.Fault)
	if h := e.Hint(); h != "" {
		s += ": " + h
	}
	return s
}

// hints are for faults that a person can do something about, by what they
// contain. Firecracker tells the errno, but not what to do.
var hints = [...]struct{ fault, hint string }{
	{"Error creating KVM object", "`fcvm doctor` tells what KVM lacks here"},
	{"Cannot open/create the tap device", "the TAP must exist, belong to this user, and be nobody else's"},
	{"Open tap device failed", "the TAP must exist, belong to this user, and be nobody else's"},
	{"Failed to UFFD object", "userfaultfd is not permitted to this user: `fcvm doctor` tells what grants it"},
	{"Cannot restore hugetlbfs backed snapshot", "use the mem backend uffd with --policy copy"},
	{"Invalid snapshot state", "the snapshot is damaged, or of another version of Firecracker"},
	{"Failed to load snapshot state from file", "the snapshot is damaged, or of another version of Firecracker"},
	{"unknown field", "fcvm takes this Firecracker for a newer version than it is"},
}

// Hint says what a person can do about it, or nothing.
func (e *Error) Hint() string {
	for _, h := range hints {
		if strings.Contains(e.Fault, h.fault) {
			return h.hint
		}
	}
	return ""
}

// Client is one Firecracker's. Its methods may be called concurrently.
type Client struct {
	http    *http.Client
	version Version
}

// Dial asks the Firecracker that listens on socket for its version. It wraps
// [ErrClosed] when nobody listens there (yet), and [ErrUnsupported] when it is
// older than [Oldest].
func Dial(ctx context.Context, socket string) (*Client, error) {
	var d net.Dialer
	return New(ctx, func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) })
}

// New is [Dial] with connections that dial makes.
func New(ctx context.Context, dial func(context.Context) (net.Conn, error)) (*Client, error) {
	c := &Client{http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		// Its HTTP server knows no content encodings.
		DisableCompression: true,
		MaxIdleConns:       1,
	}}}
	var v struct {
		Version string `json:"firecracker_version"`
	}
	err := c.do(ctx, http.MethodGet, "/version", nil, &v)
	if err == nil {
		c.version, err = ParseVersion(v.Version)
	}
	if err == nil && c.version.Compare(Oldest) < 0 {
		err = fmt.Errorf("%w: version %s is older than %s", ErrUnsupported, c.version, Oldest)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Version of the Firecracker.
func (c *Client) Version() Version { return c.version }

// Has tells whether the Firecracker can do f.
func (c *Client) Has(f Feature) bool { return c.version.Has(f) }

// Close closes idle connections. Firecracker does not notice.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// put sends body to path, unless it uses a feature that the version lacks.
func (c *Client) put(ctx context.Context, path string, body any, used map[Feature]bool) error {
	if err := c.version.need(used); err != nil {
		return fmt.Errorf("put %s: %w", path, err)
	}
	return c.do(ctx, http.MethodPut, path, body, nil)
}

// do makes one request. A nil body sends none; result may be nil.
func (c *Client) do(ctx context.Context, method, path string, body, result any) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, Timeout)
		defer cancel()
	}
	var sent io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode request %s %s: %w", method, path, err)
		}
		sent = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, sent)
	if err != nil {
		return fmt.Errorf("make request %s %s: %w", method, path, err)
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask firecracker: %w", ended(ctx, err))
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("ask firecracker: %w", ended(ctx, err))
	case len(b) > maxAnswer:
		return fmt.Errorf("ask firecracker: %s %s: answer of over %d bytes", method, path, maxAnswer)
	}
	return answer(method, path, resp.StatusCode, b, result)
}

// answer reads what Firecracker said.
func answer(method, path string, status int, b []byte, result any) error {
	if status < 200 || status > 299 {
		return &Error{Method: method, Path: path, Status: status, Fault: fault(b)}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(b, result); err != nil {
		return fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	return nil
}

// fault is the message of a documented error body, or what else it holds.
func fault(b []byte) string {
	var body struct {
		Fault string `json:"fault_message"`
	}
	if err := json.Unmarshal(b, &body); err == nil && body.Fault != "" {
		// Nested errors span lines.
		return strings.Join(strings.Fields(body.Fault), " ")
	}
	if len(b) == 0 {
		return "no reason given"
	}
	return fmt.Sprintf("%.200q", b)
}

// ended wraps [ErrClosed] around the errors of a socket whose owner has gone. net
// and http tell of it in several ways.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, syscall.ENOENT, net.ErrClosed} {
		if errors.Is(err, gone) {
			return fmt.Errorf("%w: %w", ErrClosed, err)
		}
	}
	return err
}
