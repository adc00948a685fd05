//go:build linux

package pstest

import (
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// vmmProcess is the inside of a VMM.
type vmmProcess struct {
	config *Config
	memory *memory
	// mu guards what a handshake leaves behind.
	mu    sync.Mutex
	conn  *net.UnixConn
	pidfd int
}

// serveParent does what a VMM is asked for, until nobody asks any more, also in the
// middle of a script that hangs.
func serveParent() int {
	in, out := gob.NewDecoder(os.Stdin), gob.NewEncoder(os.NewFile(answerFD, "answers"))
	var mu sync.Mutex // guards out
	v := &vmmProcess{pidfd: -1}
	answerOne := func(r request) {
		a, err := v.do(r)
		if a.Number = r.Number; err != nil {
			a.Err = err.Error()
		}
		mu.Lock()
		defer mu.Unlock()
		if err := out.Encode(a); err != nil {
			fmt.Fprintln(os.Stderr, "pstest:", err)
			os.Exit(1)
		}
	}
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			return 0
		}
		if r.Start != nil { // before anything else
			answerOne(r)
			continue
		}
		go answerOne(r)
	}
}

func (v *vmmProcess) do(r request) (a answer, err error) {
	switch {
	case r.Start != nil:
		unix.CloseOnExec(templateFD)
		v.config = r.Start
		if v.memory, err = newMemory(r.Start, templateFD); err == nil {
			a.Mappings, a.UFFD = v.memory.mappings, v.memory.number()
		}
	case r.Handshake != nil:
		err = v.shakeHands(r.Handshake)
	case r.AwaitClose:
		err = v.awaitClose()
	case r.Disconnect:
		if conn := v.connection(); conn != nil {
			err = conn.Close()
		}
	case r.Script != nil:
		a.Result, a.Hung = v.run(r.Script)
	default:
		err = errors.New("nothing was asked for")
	}
	return a, err
}

// connection is that of the last handshake, or nil.
func (v *vmmProcess) connection() *net.UnixConn {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.conn
}

// shakeHands does what Firecracker does, or what h asks for instead.
func (v *vmmProcess) shakeHands(h *Handshake) error {
	if v.memory.fd == nil {
		return errors.New("memory of this shape has no userfaultfd")
	}
	conn, err := dial(h.Socket)
	if err != nil {
		return err
	}
	v.mu.Lock()
	if v.conn != nil {
		v.conn.Close()
	}
	v.conn = conn
	v.mu.Unlock()
	if !h.Silent {
		err = v.say(conn, h)
	}
	if h.Close {
		conn.Close()
	}
	return err
}

func (v *vmmProcess) say(conn *net.UnixConn, h *Handshake) error {
	body := h.Body
	if len(body) == 0 {
		var err error
		if body, err = json.Marshal(v.memory.mappings); err != nil {
			return err
		}
	}
	// Who does not read is not waited for for ever.
	if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	return v.memory.fd.Use(func(fd int) error {
		rights, err := v.rights(h.Descriptors, fd)
		if err != nil {
			return err
		}
		return send(conn, h, body, rights)
	})
}

// dial connects, also to a server that has bound its socket and does not listen yet.
func dial(socket string) (*net.UnixConn, error) {
	for try := 0; ; try++ {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
		if err == nil || !errors.Is(err, unix.ECONNREFUSED) || try == 1000 {
			return conn, err
		}
		time.Sleep(time.Millisecond)
	}
}

// rights is the control message with the descriptors.
func (v *vmmProcess) rights(kinds []Descriptor, uffdFD int) ([]byte, error) {
	if len(kinds) == 0 {
		kinds = []Descriptor{UFFD}
		if v.config.Shape == Template {
			kinds = append(kinds, Pidfd)
		}
	}
	var fds []int
	for _, k := range kinds {
		fd := uffdFD
		switch k {
		case None:
			continue
		case UFFD:
		case Pidfd:
			var err error
			if fd, err = v.openPidfd(); err != nil {
				return nil, err
			}
		case Pipe:
			fd = answerFD
		}
		fds = append(fds, fd)
	}
	if len(fds) == 0 {
		return nil, nil
	}
	return unix.UnixRights(fds...), nil
}

func (v *vmmProcess) openPidfd() (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.pidfd < 0 {
		fd, err := unix.PidfdOpen(os.Getpid(), 0)
		if err != nil {
			return -1, os.NewSyscallError("pidfd_open", err)
		}
		v.pidfd = fd
	}
	return v.pidfd, nil
}

// send writes body in pieces. That the other end closed the connection is its
// answer, and no error here.
func send(conn *net.UnixConn, h *Handshake, body, rights []byte) error {
	for first := true; len(body) > 0; first = false {
		n := len(body)
		if h.Piece > 0 {
			n = min(n, h.Piece)
		}
		var oob []byte
		if last := n == len(body); h.DescriptorsLast && last || !h.DescriptorsLast && first {
			oob = rights
		}
		if !first {
			time.Sleep(h.Pause)
		}
		sent, _, err := conn.WriteMsgUnix(body[:n], oob, nil)
		if err == nil && sent < n {
			_, err = conn.Write(body[sent:n])
		}
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return err
		}
		body = body[n:]
	}
	return nil
}

func (v *vmmProcess) awaitClose() error {
	conn := v.connection()
	if conn == nil {
		return errors.New("there is no connection")
	}
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	n, err := conn.Read(make([]byte, 1))
	switch {
	case n > 0:
		return errors.New("the page server said something")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("the page server has not ended the connection after %v", patience)
	case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET):
		return err
	}
	return nil
}
