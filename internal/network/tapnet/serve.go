//go:build linux

package tapnet

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/network"
	"fcvm/internal/vmm"
)

// Publisher is a network that ports are published in.
type Publisher interface {
	// Publish publishes all of these ports or, with an error, none.
	Publish(ctx context.Context, ports []vmm.Port) error
}

// requestTime bounds how long a client may take to say what it wants.
const requestTime = 10 * time.Second

// RunServe is the command [Serve]: begin makes the network from the packet socket. It returns
// when the VMM has ended, or was not started at all. What it began is for the end of
// the process to end.
func RunServe(args []string, begin func(packets *os.File, hostLoopback bool) (Publisher, error)) error {
	fs := flag.NewFlagSet(Serve, flag.ContinueOnError)
	control := fs.Int(flagControl, -1, "")
	link := fs.Int(flagLink, -1, "")
	host := fs.Bool(flagHost, false, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *link < 0 || *control < 0 {
		return errors.New("this command is for fcvm itself")
	}
	f := os.NewFile(uintptr(*control), "control")
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	packets, pidfd, err := receiveLink(*link)
	if err != nil || packets == nil {
		return err
	}
	p, err := begin(packets, *host)
	if err != nil {
		return err
	}
	go accept(l, p) // until the process ends
	return waitFor(pidfd)
}

// receiveLink receives what sendLink sends; nothing at all if the VMM's process
// ended before.
func receiveLink(link int) (packets *os.File, pidfd int, err error) {
	defer unix.Close(link)
	oob := make([]byte, unix.CmsgSpace(2*4))
	var n, oobn int
	for {
		n, oobn, _, _, err = unix.Recvmsg(link, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, -1, fmt.Errorf("receive the TAP: %w", err)
	}
	if n == 0 {
		return nil, -1, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, -1, fmt.Errorf("receive the TAP: %w", err)
	}
	if len(msgs) != 1 {
		return nil, -1, fmt.Errorf("receive the TAP: %d messages instead of one", len(msgs))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, -1, fmt.Errorf("receive the TAP: %w", err)
	}
	if len(fds) != 2 {
		return nil, -1, fmt.Errorf("receive the TAP: %d descriptors instead of two", len(fds))
	}
	return os.NewFile(uintptr(fds[0]), "packets:"+Device), fds[1], nil
}

// waitFor returns when the process has ended.
func waitFor(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, -1)
		switch {
		case err != nil && err != unix.EINTR:
			return fmt.Errorf("wait for the VMM: %w", err)
		case n == 1:
			return nil
		}
	}
}

// accept answers one client after the other.
func accept(l net.Listener, p Publisher) {
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "fcvm: network: accept:", err)
			time.Sleep(time.Second) // out of descriptors
			continue
		}
		if err := answer(c, p); err != nil {
			fmt.Fprintln(os.Stderr, "fcvm: network: control:", err)
		}
		c.Close()
	}
}

func answer(c net.Conn, p Publisher) error {
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	_ = c.SetDeadline(time.Now().Add(requestTime))
	line, err := readLine(c)
	if err != nil {
		return err
	}
	var req Request
	if err := json.Unmarshal(line, &req); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	var reply Reply
	if err := p.Publish(ctx, req.Publish); err != nil {
		reply = Reply{Error: err.Error(), Taken: errors.Is(err, network.ErrTaken)}
	}
	return json.NewEncoder(c).Encode(reply)
}
