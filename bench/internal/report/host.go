package report

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm/qemu"
)

// Host is the machine that the numbers are of.
type Host struct {
	CPUs        int    `json:"cpus"`
	CPU         string `json:"cpu"`
	MemoryBytes int64  `json:"memory_bytes"`
	Kernel      string `json:"kernel"`
	QEMU        string `json:"qemu"`
	Accel       string `json:"accel"`
	FCVM        string `json:"fcvm"`
}

// Look finds out what it can; what it can't stays empty. FCVM is for the caller to
// say.
func Look(ctx context.Context) Host {
	h := Host{CPUs: runtime.NumCPU(), CPU: procField("/proc/cpuinfo", "model name")}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	kb, _, _ := strings.Cut(procField("/proc/meminfo", "MemTotal"), " ")
	if n, err := strconv.ParseInt(kb, 10, 64); err == nil {
		h.MemoryBytes = n << 10
	}
	if info, err := qemu.New(qemu.Options{}).Info(ctx); err == nil {
		h.QEMU, h.Accel = info.Version, info.Accel
	}
	return h
}

// String is a line for people.
func (h Host) String() string {
	return fmt.Sprintf("host: %d CPUs (%s), %d MiB, Linux %s, QEMU %s with %s; %s",
		h.CPUs, cmp.Or(h.CPU, "unknown"), h.MemoryBytes>>20, h.Kernel, cmp.Or(h.QEMU, "none"), cmp.Or(h.Accel, "nothing"), h.FCVM)
}

// procField returns the first value of a field, in files of "name : value".
func procField(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
