//go:build linux

package pageserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// The control protocol: a line of JSON each way, any number of times. A server
// is not idle as long as somebody is connected. Descriptors go along with a line,
// as SCM_RIGHTS of its first byte.
type (
	controlRequest struct {
		// Op is one of the keys of controlOps.
		Op string `json:"op"`
		// Force shuts down although clones run. Who holds their [Guest]s has them
		// served on.
		Force bool `json:"force,omitempty"`
		// Guest is to be served, by the descriptors that come along.
		Guest *Guest `json:"guest,omitempty"`
		// PID is that of the VMM to be recorded, from now on or, without On, not.
		PID int  `json:"pid,omitempty"`
		On  bool `json:"on,omitempty"`
		// ID tells which guest is asked for.
		ID string `json:"id,omitempty"`
	}
	controlResponse struct {
		Error string `json:"error,omitempty"`
		Stats *Stats `json:"stats,omitempty"`
		// IDs of the guests that are served.
		IDs []string `json:"ids,omitempty"`
		// Guest comes with its descriptors.
		Guest *Guest `json:"guest,omitempty"`
	}
)

const (
	// maxControlLine bounds a question; the largest has a guest's regions.
	maxControlLine = 2 * maxHandshake
	// maxControlFDs is how many descriptors come with a line.
	maxControlFDs = 3
)

// exchange is one question on the way to its answer.
type exchange struct {
	request controlRequest
	// fds came with it, and are closed if nobody takes them.
	fds      []int
	response controlResponse
	// send are descriptors that go with the response, and are closed then.
	send []int
	// after is done when the answer was sent.
	after func()
}

// controlOps are what can be asked.
var controlOps = map[string]func(*Server, context.Context, *exchange) error{
	"stats":    (*Server).controlStats,
	"shutdown": (*Server).controlShutdown,
	"serve":    (*Server).controlServe,
	"guests":   (*Server).controlGuests,
	"guest":    (*Server).controlGuest,
	"template": (*Server).controlTemplate,
	"record":   (*Server).controlRecord,
}

// serveControl answers one connection to the control socket.
func (s *Server) serveControl(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	if _, err := credentials(conn, nil); err != nil {
		s.config.Log.Warn("control connection refused", "error", err)
		return
	}
	s.mu.Lock()
	s.controls++
	s.rearm()
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.controls--
		s.rearm()
		s.mu.Unlock()
	}()
	stopped := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopped()

	in := lineReader{conn: conn, max: maxControlLine}
	defer in.close()
	for {
		line, fds, err := in.next()
		if err != nil {
			return
		}
		x := &exchange{fds: fds}
		s.control(ctx, line, x)
		closeAll(x.fds)
		if err := x.answer(conn); err != nil {
			return
		}
		if x.after != nil {
			x.after()
		}
	}
}

// answer sends the response. Who does not read it does not hold us up.
func (x *exchange) answer(conn *net.UnixConn) error {
	defer closeAll(x.send)
	_ = conn.SetWriteDeadline(time.Now().Add(answerTimeout))
	return writeLine(conn, x.response, x.send)
}

// control answers one question.
func (s *Server) control(ctx context.Context, line []byte, x *exchange) {
	if err := json.Unmarshal(line, &x.request); err != nil {
		x.response.Error = fmt.Sprintf("parse request: %v", err)
		return
	}
	op, ok := controlOps[x.request.Op]
	if !ok {
		x.response.Error = fmt.Sprintf("unknown op %q", x.request.Op)
		return
	}
	if err := op(s, ctx, x); err != nil {
		x.response = controlResponse{Error: err.Error()}
	}
}

func (s *Server) controlStats(_ context.Context, x *exchange) error {
	st := s.Stats()
	x.response.Stats = &st
	return nil
}

func (s *Server) controlShutdown(_ context.Context, x *exchange) error {
	s.mu.Lock()
	n := len(s.sessions)
	s.mu.Unlock()
	if n > 0 && !x.request.Force {
		return fmt.Errorf("%d VMs are being served", n)
	}
	x.after = func() { s.stop(errShutdown) }
	return nil
}

// controlServe begins a session.
func (s *Server) controlServe(ctx context.Context, x *exchange) error {
	g := x.request.Guest
	if g == nil {
		return errors.New("serve what? there is no guest")
	}
	fds := x.fds
	x.fds = nil
	if err := g.received(fds); err != nil {
		return err
	}
	defer g.Close()
	if s.sessionOf(g.ID) != nil {
		return nil // asked for twice, because the first answer was lost
	}
	ses, err := s.take(g, nil)
	if errors.Is(err, errOver) {
		return nil
	}
	if err != nil {
		return err
	}
	// It lives on when this connection ends.
	s.running.Go(func() { s.serve(ctx, ses) })
	return nil
}

func (s *Server) sessionOf(id string) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ses := range s.sessions {
		if ses.id == id {
			return ses
		}
	}
	return nil
}

func (s *Server) controlGuests(_ context.Context, x *exchange) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	x.response.IDs = make([]string, 0, len(s.sessions))
	for ses := range s.sessions {
		x.response.IDs = append(x.response.IDs, ses.id)
	}
	return nil
}

// controlGuest gives what a supervisor that was restarted has to hold again.
func (s *Server) controlGuest(_ context.Context, x *exchange) error {
	ses := s.sessionOf(x.request.ID)
	if ses == nil {
		return fmt.Errorf("guest %s is not served here", x.request.ID)
	}
	ses.mu.Lock()
	defer ses.mu.Unlock()
	if ses.closing {
		return errOver
	}
	g := &Guest{uffd: ses.fd, pidfd: ses.vmm.fd, ledger: ses.ledger.file}
	err := g.use(func(fds []int) (err error) {
		x.send, err = dupAll(fds)
		return err
	})
	if err == nil {
		x.response.Guest = &Guest{ID: ses.id, PID: ses.vmm.pid, Regions: ses.regions, Served: true}
	}
	return err
}

func (s *Server) controlRecord(_ context.Context, x *exchange) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ses := range s.sessions {
		if ses.vmm.pid == x.request.PID {
			ses.record(x.request.On)
			return nil
		}
	}
	return fmt.Errorf("VMM %d is not served here", x.request.PID)
}

func (s *Server) controlTemplate(_ context.Context, x *exchange) (err error) {
	if s.config.Template == nil {
		return errors.New("policy copy has no template")
	}
	x.send, err = dupAll([]int{int(s.config.Template.Fd())})
	return err
}

// dupAll duplicates descriptors, so that they outlive the lock under which they are
// known to be open.
func dupAll(fds []int) ([]int, error) {
	var all []int
	for _, fd := range fds {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(all)
			return nil, fmt.Errorf("duplicate descriptor: %w", err)
		}
		all = append(all, dup)
	}
	return all, nil
}

// lineReader reads lines, and the descriptors that came with each.
type lineReader struct {
	conn *net.UnixConn
	max  int
	buf  []byte
	fds  []int
}

// errLong ends a connection: nobody knows where the next line would begin.
var errLong = errors.New("line is too long")

// next returns a line without its end, valid until the next call, and descriptors,
// which are the caller's.
func (r *lineReader) next() (line []byte, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(maxControlFDs*4))
	for {
		if i := bytes.IndexByte(r.buf, '\n'); i >= 0 {
			line = bytes.Clone(r.buf[:i])
			r.buf = r.buf[:copy(r.buf, r.buf[i+1:])]
			fds, r.fds = r.fds, nil
			return line, fds, nil
		}
		if r.max > 0 && len(r.buf) >= r.max {
			return nil, nil, errLong
		}
		var chunk [16 << 10]byte
		n, oobn, flags, _, err := r.conn.ReadMsgUnix(chunk[:], oob)
		if oobn > 0 {
			got, perr := rights(oob[:oobn])
			r.fds = append(r.fds, got...)
			if perr != nil {
				return nil, nil, perr
			}
		}
		switch {
		case err != nil:
			return nil, nil, err
		case flags&unix.MSG_CTRUNC != 0 || len(r.fds) > maxControlFDs:
			return nil, nil, errors.New("too many descriptors")
		case n == 0:
			return nil, nil, net.ErrClosed
		}
		r.buf = append(r.buf, chunk[:n]...)
	}
}

// close closes descriptors that came with no whole line.
func (r *lineReader) close() {
	closeAll(r.fds)
	r.fds = nil
}

// rights returns the descriptors of a control message.
func rights(oob []byte) (fds []int, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive descriptors: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, fmt.Errorf("receive descriptors: %w", err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// writeLine sends v as a line, with descriptors.
func writeLine(conn *net.UnixConn, v any, fds []int) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(line, oob, nil)
	if err == nil && n < len(line) {
		_, err = conn.Write(line[n:])
	}
	return err
}
