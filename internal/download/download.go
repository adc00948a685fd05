// Package download fetches files over HTTP. What a file must be is known before
// by its SHA-256, so that it does not matter which server, mirror or proxy it came
// from, or in how many pieces.
//
// What came so far lies beside the file, as PATH.part, also after an error and after
// a crash: the next call goes on from there. Of one path, one download may run at a
// time; callers hold a lock.
//
// The proxy is that of the environment (HTTPS_PROXY, NO_PROXY).
package download

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// PartSuffix is what the name of an unfinished file ends with.
const PartSuffix = ".part"

// DefaultIdle is how long a server may send nothing.
const DefaultIdle = time.Minute

// Sentinels on which callers decide.
var (
	// ErrUnreachable means that the server gave no answer at all.
	ErrUnreachable = errors.New("cannot reach the server")
	// ErrSum means that the file is complete, and is another one.
	ErrSum = errors.New("its SHA-256 is another one")
)

// File is what is to be downloaded.
type File struct {
	// URL of the file, http or https.
	URL string
	// Path is where it ends up, complete and checked.
	Path string
	// SHA256 that it must have, in lower-case hexadecimal.
	SHA256 string
	// Size in bytes, or 0 where it is not known; then Limit bounds it.
	Size, Limit int64
	// Idle is how long the server may send nothing; 0 means [DefaultIdle].
	Idle time.Duration
	// Progress, if any, is told the bytes that are there and those of the whole, 0
	// where nobody knows. It is called from the goroutine that called Fetch.
	Progress func(done, total int64)
}

// Fetch downloads f. A connection that breaks is made anew as long as each brings
// something. When Fetch fails, f.Path is as it was before.
func Fetch(ctx context.Context, f File) error {
	if f.Progress == nil {
		f.Progress = func(int64, int64) {}
	}
	if f.Size > 0 {
		f.Limit = f.Size
	}
	if err := f.fetch(ctx); err != nil {
		return fmt.Errorf("download %s: %w", f.URL, err)
	}
	return nil
}

// Get returns a small file, of at most limit bytes, unchecked.
func Get(ctx context.Context, url string, limit int64) ([]byte, error) {
	ctx, stop, alive := watch(ctx, DefaultIdle)
	defer stop()
	b, err := get(ctx, url, limit, alive)
	if err != nil {
		return nil, fmt.Errorf("download %s: %w", url, because(ctx, err))
	}
	return b, nil
}

func get(ctx context.Context, url string, limit int64, alive func()) ([]byte, error) {
	resp, err := ask(ctx, url, 0)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the server says %s", resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(&livingReader{resp.Body, alive}, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("it is over %d bytes", limit)
	}
	return b, err
}

// transfer is a download under way.
type transfer struct {
	File
	part  *os.File
	n     int64     // bytes in part
	hash  hash.Hash // of these
	total int64     // of the whole, 0 where nobody knows
	mixed bool      // the bytes are of more than one answer
}

func (f File) fetch(ctx context.Context) error {
	part, err := os.OpenFile(f.Path+PartSuffix, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer part.Close()
	t := &transfer{File: f, part: part, hash: sha256.New(), total: f.Size}
	if t.n, err = io.Copy(t.hash, part); err != nil {
		return fmt.Errorf("read what came before: %w", err)
	}
	for {
		from := t.n
		err := t.more(ctx)
		switch {
		case err == nil && t.sum() == f.SHA256:
			return t.finish()
		case err == nil:
			mixed, sum := t.mixed, t.sum()
			if err := t.reset(); err != nil {
				return err
			}
			if mixed {
				continue // the file may have changed in between
			}
			return fmt.Errorf("%w: %s, not %s; nothing of it was kept", ErrSum, sum, f.SHA256)
		case errors.As(err, new(brokenError)) && t.n > from && ctx.Err() == nil:
			// It goes on from there.
		default:
			if t.n > 0 {
				err = fmt.Errorf("%w; %s there, and the next attempt goes on from them", err, t.have())
			}
			return err
		}
	}
}

func (t *transfer) have() string {
	if t.total > 0 {
		return fmt.Sprintf("%d of %d bytes are", t.n, t.total)
	}
	return fmt.Sprintf("%d bytes are", t.n)
}

func (t *transfer) sum() string { return hex.EncodeToString(t.hash.Sum(nil)) }

func (t *transfer) reset() error {
	if err := t.part.Truncate(0); err != nil {
		return fmt.Errorf("start over: %w", err)
	}
	if _, err := t.part.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("start over: %w", err)
	}
	t.hash.Reset()
	t.n, t.mixed = 0, false
	return nil
}

// brokenError is an answer that broke off.
type brokenError struct{ error }

func (e brokenError) Unwrap() error { return e.error }

// more asks for what is missing, and reads it.
func (t *transfer) more(ctx context.Context) error {
	if t.n > 0 && t.sum() == t.SHA256 {
		return nil // an earlier call ended before it could say so
	}
	idle := t.Idle
	if idle == 0 {
		idle = DefaultIdle
	}
	ctx, stop, alive := watch(ctx, idle)
	defer stop()
	resp, err := ask(ctx, t.URL, t.n)
	if err != nil {
		return because(ctx, err)
	}
	defer resp.Body.Close()
	if err := t.answer(resp); err != nil {
		return err
	}
	if t.total > t.Limit {
		return fmt.Errorf("the server has %d bytes of it, which are more than %d", t.total, t.Limit)
	}
	if t.Size > 0 && t.total > 0 && t.total != t.Size {
		return fmt.Errorf("the server has %d bytes of it, not %d", t.total, t.Size)
	}
	if err := t.read(&livingReader{resp.Body, alive}); err != nil {
		if errors.As(err, new(brokenError)) {
			return brokenError{because(ctx, err)}
		}
		return err
	}
	if t.total > 0 && t.n < t.total {
		return brokenError{io.ErrUnexpectedEOF}
	}
	return nil
}

// answer looks at what the server is about to send.
func (t *transfer) answer(resp *http.Response) error {
	switch resp.StatusCode {
	case http.StatusOK: // all of it, whatever was asked for
		if t.n > 0 {
			if err := t.reset(); err != nil {
				return err
			}
		}
		if resp.ContentLength > 0 {
			t.total = resp.ContentLength
		}
	case http.StatusPartialContent:
		from, total, err := contentRange(resp.Header.Get("Content-Range"))
		if err != nil {
			return err
		}
		if from != t.n {
			return fmt.Errorf("the server sends bytes from %d on, and was asked for those from %d on", from, t.n)
		}
		if total > 0 {
			t.total = total
		}
		t.mixed = t.n > 0
	case http.StatusRequestedRangeNotSatisfiable:
		// It has no more than what is here, and that is another file.
		if err := t.reset(); err != nil {
			return err
		}
		return errors.New("the server has less of it than came before; that was removed, try again")
	default:
		return fmt.Errorf("the server says %s", resp.Status)
	}
	return nil
}

// contentRange reads "bytes 100-199/200"; the whole is 0 where it is "*".
func contentRange(s string) (from, total int64, err error) {
	bad := fmt.Errorf("the server sends a range that cannot be read: %.80q", s)
	rest, ok := strings.CutPrefix(s, "bytes ")
	if !ok {
		return 0, 0, bad
	}
	r, whole, ok1 := strings.Cut(rest, "/")
	first, _, ok2 := strings.Cut(r, "-")
	if !ok1 || !ok2 {
		return 0, 0, bad
	}
	if from, err = strconv.ParseInt(first, 10, 64); err != nil || from < 0 {
		return 0, 0, bad
	}
	if whole == "*" {
		return from, 0, nil
	}
	if total, err = strconv.ParseInt(whole, 10, 64); err != nil || total <= from {
		return 0, 0, bad
	}
	return from, total, nil
}

func (t *transfer) read(body io.Reader) error {
	buf := make([]byte, 128<<10)
	t.Progress(t.n, t.total)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if t.n+int64(n) > t.Limit {
				return errors.Join(fmt.Errorf("it is over %d bytes", t.Limit), t.reset())
			}
			if _, err := t.part.WriteAt(buf[:n], t.n); err != nil {
				return fmt.Errorf("%w: make room there", err)
			}
			t.hash.Write(buf[:n])
			t.n += int64(n)
			t.Progress(t.n, t.total)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return brokenError{err}
		}
	}
}

func (t *transfer) finish() error {
	err := t.part.Sync()
	if err == nil {
		err = t.part.Chmod(0o644)
	}
	if err == nil {
		err = os.Rename(t.Path+PartSuffix, t.Path)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(t.Path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// ask makes a request for the bytes from a place on.
func ask(ctx context.Context, url string, from int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	// Sums are of the file itself, not of what was unpacked on the way.
	req.Header.Set("Accept-Encoding", "identity")
	if from > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(from, 10)+"-")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return resp, nil
}

// watch returns a context that ends when alive was not called for some time.
func watch(ctx context.Context, idle time.Duration) (_ context.Context, stop, alive func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(idle, func() { cancel(fmt.Errorf("%w: it sent nothing for %v", ErrUnreachable, idle)) })
	return ctx, func() { timer.Stop(); cancel(nil) }, func() { timer.Reset(idle) }
}

// because prefers the reason for which a context ended to what broke off.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// livingReader tells of each read that brought something.
type livingReader struct {
	io.Reader
	alive func()
}

func (r *livingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.alive()
	}
	return n, err
}
