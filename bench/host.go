package main

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

// host is the machine that the numbers are of.
type host struct {
	CPUs        int    `json:"cpus"`
	CPU         string `json:"cpu"`
	MemoryBytes int64  `json:"memory_bytes"`
	Kernel      string `json:"kernel"`
	QEMU        string `json:"qemu"`
	Accel       string `json:"accel"`
	FCVM        string `json:"fcvm"`
}

// lookAtHost finds out what it can; what it can't stays empty.
func (b *bench) lookAtHost(ctx context.Context) {
	h := host{CPUs: runtime.NumCPU(), CPU: procField("/proc/cpuinfo", "model name")}
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
	if v, err := b.fcvm(ctx, "version"); err == nil {
		h.FCVM = strings.ReplaceAll(v, "\n", "; ")
	}
	b.host = h
	fmt.Printf("host: %d CPUs (%s), %d MiB, Linux %s, QEMU %s with %s; %s\n",
		h.CPUs, cmp.Or(h.CPU, "unknown"), h.MemoryBytes>>20, h.Kernel, h.QEMU, h.Accel, h.FCVM)
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
