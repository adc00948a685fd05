package boot

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// setLimits gives the container what it has under docker: as many open files as
// a server wants, though by default no more than select(2) bears; and a port below
// 1024, or a ping, also for who is not root.
func setLimits() error {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 524288}); err != nil {
		return fmt.Errorf("set limit of open files: %w", err)
	}
	for name, value := range map[string]string{
		"ip_unprivileged_port_start": "0",
		"ping_group_range":           "0 2147483647",
	} {
		// A kernel without it has no such privilege to give.
		_ = os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0)
	}
	return nil
}
