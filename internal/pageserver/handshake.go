//go:build linux

package pageserver

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// maxHandshake bounds the JSON of a handshake. Firecracker sends some 130 bytes
// for each region of guest memory.
const maxHandshake = 64 << 10

// Mapping is a region of guest memory, as Firecracker describes it in its
// handshake (GuestRegionUffdMapping): a JSON array of these comes with the userfaultfd.
type Mapping struct {
	// Addr is where the VMM mapped the region.
	Addr uint64 `json:"base_host_virt_addr"`
	// Size in bytes.
	Size uint64 `json:"size"`
	// Offset of the region in the memory file.
	Offset uint64 `json:"offset"`
	// PageSize in bytes.
	PageSize uint64 `json:"page_size"`
	// PageSizeKiB is the older name of PageSize. It is in bytes as well.
	PageSizeKiB uint64 `json:"page_size_kib"`
}

// SendHandshake hands a VMM to a page server, over a connection to its socket,
// by one message: the mappings, the userfaultfd, and, unless negative, a pidfd
// of the VMM, which tells when the VMM has ended and lets the server kill it. Firecracker
// sends no pidfd; there the peer of the connection is the VMM. A PageSize of 0
// means 4096. The caller keeps its descriptors.
func SendHandshake(conn *net.UnixConn, uffdFD, pidfd int, mappings []Mapping) error {
	ms := slices.Clone(mappings)
	for i := range ms {
		ms[i].PageSize = cmp.Or(ms[i].PageSize, pageSize)
		ms[i].PageSizeKiB = ms[i].PageSize
	}
	body, err := json.Marshal(ms)
	if err != nil {
		return fmt.Errorf("send handshake: %w", err)
	}
	fds := []int{uffdFD}
	if pidfd >= 0 {
		fds = append(fds, pidfd)
	}
	n, _, err := conn.WriteMsgUnix(body, unix.UnixRights(fds...), nil)
	if err == nil && n < len(body) {
		_, err = conn.Write(body[n:])
	}
	if err != nil {
		return fmt.Errorf("send handshake: %w", err)
	}
	return nil
}

// ReceiveHandshake takes what a VMM sends a page server, for handing it on. The caller
// has set a deadline, and owns the userfaultfd. How the mappings fit a memory file is
// checked by the page server.
func ReceiveHandshake(conn *net.UnixConn) (uffdFD int, mappings []Mapping, err error) {
	h, err := receiveHandshake(conn)
	if err != nil {
		return -1, nil, err
	}
	defer h.close()
	return h.takeFD(), h.mappings, nil
}

// handshake is what a VMM handed over. Its owner closes the descriptors.
type handshake struct {
	mappings []Mapping
	fds      []int
}

func (h *handshake) close() {
	closeAll(h.fds)
	h.fds = nil
}

// receiveHandshake reads a handshake, which may arrive in pieces: the array is
// complete when it is valid JSON. The caller has set a deadline. On error all
// descriptors that came are closed.
func receiveHandshake(conn *net.UnixConn) (_ *handshake, err error) {
	h := &handshake{}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	body := make([]byte, 0, 4096)
	oob := make([]byte, unix.CmsgSpace(8*4))
	for {
		if len(body) == maxHandshake {
			return nil, fmt.Errorf("receive handshake: more than %d bytes", maxHandshake)
		}
		body = slices.Grow(body, min(4096, maxHandshake-len(body)))
		free := body[len(body):min(cap(body), maxHandshake)]
		n, oobn, flags, _, err := conn.ReadMsgUnix(free, oob)
		if oobn > 0 {
			// Descriptors belong to us from here on, whatever else is wrong.
			if err := h.take(oob[:oobn]); err != nil {
				return nil, err
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, fmt.Errorf("receive handshake: timeout after %d bytes", len(body))
		case err != nil && !errors.Is(err, io.EOF):
			return nil, fmt.Errorf("receive handshake: %w", err)
		case flags&unix.MSG_CTRUNC != 0:
			return nil, errors.New("receive handshake: too many descriptors")
		case n == 0:
			return nil, fmt.Errorf("receive handshake: connection ended after %d bytes", len(body))
		}
		body = body[:len(body)+n]
		if !complete(body) {
			continue
		}
		if h.mappings, err = parseMappings(body); err != nil {
			return nil, err
		}
		if len(h.fds) < 1 || len(h.fds) > 2 {
			return nil, fmt.Errorf("receive handshake: %d descriptors came with it, want a userfaultfd and at most a pidfd", len(h.fds))
		}
		return h, nil
	}
}

// takeFD passes the first descriptor on to the caller, who owns it then.
func (h *handshake) takeFD() int {
	fd := h.fds[0]
	h.fds = h.fds[1:]
	return fd
}

func (h *handshake) take(oob []byte) error {
	fds, err := rights(oob)
	h.fds = append(h.fds, fds...)
	return err
}

// complete tells whether body may be parsed: it ends like an array, and is valid.
func complete(body []byte) bool {
	b := bytes.TrimSpace(body)
	return len(b) > 0 && (b[0] != '[' || b[len(b)-1] == ']' && json.Valid(b))
}

// parseMappings reads the JSON of a handshake. It comes from a VMM, which is not
// to be trusted more than its guest.
func parseMappings(body []byte) ([]Mapping, error) {
	var ms []Mapping
	if err := json.Unmarshal(body, &ms); err != nil {
		return nil, fmt.Errorf("parse handshake: %w", err)
	}
	for i := range ms {
		m := &ms[i]
		if m.PageSize == 0 {
			m.PageSize = m.PageSizeKiB
		}
		if m.PageSizeKiB != 0 && m.PageSizeKiB != m.PageSize {
			return nil, fmt.Errorf("parse handshake: region %d has pages of %d and of %d bytes", i, m.PageSize, m.PageSizeKiB)
		}
		m.PageSizeKiB = m.PageSize
	}
	return ms, nil
}

// checkMappings refuses what does not describe whole pages of the memory file,
// each once and at one address. It returns the mappings by ascending address.
func checkMappings(ms []Mapping, fileSize int64) ([]Mapping, error) {
	if len(ms) == 0 {
		return nil, errors.New("check handshake: no regions")
	}
	for i, m := range ms {
		switch {
		case m.PageSize != pageSize && m.PageSize != hugePageSize:
			return nil, fmt.Errorf("check handshake: region %d has pages of %d bytes, want %d or %d", i, m.PageSize, pageSize, hugePageSize)
		case m.PageSize != ms[0].PageSize:
			return nil, fmt.Errorf("check handshake: region %d has pages of another size", i)
		case m.Size == 0 || m.Size%m.PageSize != 0 || m.Addr%m.PageSize != 0 || m.Offset%m.PageSize != 0:
			return nil, fmt.Errorf("check handshake: region %d (%#x+%#x at offset %#x) is not whole pages of %d bytes", i, m.Addr, m.Size, m.Offset, m.PageSize)
		case m.Addr == 0 || m.Size > math.MaxInt64 || m.Addr > math.MaxInt64-m.Size:
			return nil, fmt.Errorf("check handshake: region %d (%#x+%#x) is not in user space", i, m.Addr, m.Size)
		case m.Size > uint64(fileSize) || m.Offset > uint64(fileSize)-m.Size:
			return nil, fmt.Errorf("check handshake: region %d ends behind the memory file (offset %#x, size %#x, file %#x)", i, m.Offset, m.Size, fileSize)
		}
	}
	byOffset := slices.SortedFunc(slices.Values(ms), func(a, b Mapping) int { return cmp.Compare(a.Offset, b.Offset) })
	for i := 1; i < len(ms); i++ {
		if a, b := byOffset[i-1], byOffset[i]; a.Offset+a.Size > b.Offset {
			return nil, fmt.Errorf("check handshake: regions overlap in the memory file at %#x", b.Offset)
		}
	}
	byAddr := slices.SortedFunc(slices.Values(ms), func(a, b Mapping) int { return cmp.Compare(a.Addr, b.Addr) })
	for i := 1; i < len(ms); i++ {
		if a, b := byAddr[i-1], byAddr[i]; a.Addr+a.Size > b.Addr {
			return nil, fmt.Errorf("check handshake: regions overlap at address %#x", b.Addr)
		}
	}
	return byAddr, nil
}
