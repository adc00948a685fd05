package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxHolders bounds how many processes an error message names.
const maxHolders = 5

// holders names the processes that have the file open, as far as this user may
// see. /proc/locks would not do: of a lock that was inherited it names the
// process that took it, which is never the VM. What is found is for a message
// only; the lock decides.
func holders(path string) []string {
	fds, err := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	if err != nil {
		return nil
	}
	self := strconv.Itoa(os.Getpid())
	var out []string
	seen := map[string]bool{self: true}
	for _, fd := range fds {
		pid := strings.Split(fd, "/")[2]
		if seen[pid] {
			continue
		}
		if link, err := os.Readlink(fd); err != nil || link != path {
			continue
		}
		seen[pid] = true
		name := "process"
		if comm, err := os.ReadFile(filepath.Join("/proc", pid, "comm")); err == nil {
			name = strings.TrimSpace(string(comm))
		}
		out = append(out, fmt.Sprintf("%s (pid %s)", name, pid))
	}
	return out
}

func describeHolders(names []string) string {
	const next = "; remove its clones first"
	switch {
	case len(names) == 0:
		return next
	case len(names) > maxHolders:
		return fmt.Sprintf("; held by %s and %d more%s", strings.Join(names[:maxHolders], ", "), len(names)-maxHolders, next)
	}
	return "; held by " + strings.Join(names, ", ") + next
}
