//go:build linux && amd64

package attach

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// The mmap that is replaced.
const (
	wantProt  = unix.PROT_READ | unix.PROT_WRITE
	wantFlags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED
	newFlags  = unix.MAP_PRIVATE | unix.MAP_FIXED | unix.MAP_NORESERVE
	// ownFlags are those of a VMM that maps the file itself. Firecracker 1.7 to
	// 1.16 map nothing else with them.
	ownFlags = unix.MAP_PRIVATE | unix.MAP_NORESERVE
)

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h): a little-endian
// u64 per argument from byte 16 on.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

type check struct {
	offset uint32
	value  uint32
}

// The number means another call on another architecture (i386 in the same process).
var isMmap = []check{{offArch, unix.AUDIT_ARCH_X86_64}, {offNumber, unix.SYS_MMAP}}

// filter is a seccomp program that stops at the anonymous mmap of exactly size
// bytes and allows everything else. It compares whole arguments, except for the
// descriptor, which is an int: C compilers leave its upper half undefined.
func filter(size uint64) []unix.SockFilter {
	return stopping(append(isMmap[:len(isMmap):len(isMmap)],
		check{offArgs + 1*8, uint32(size)},
		check{offArgs + 1*8 + 4, uint32(size >> 32)},
		check{offArgs + 2*8, wantProt},
		check{offArgs + 2*8 + 4, 0},
		check{offArgs + 3*8, wantFlags},
		check{offArgs + 3*8 + 4, 0},
		check{offArgs + 4*8, ^uint32(0)},
	))
}

// ownFilter stops at private mappings of files that are made as guest memory is.
// How much one maps is not known before: a guest's memory has a hole below 4 GiB,
// whose size is the VMM's own affair.
func ownFilter() []unix.SockFilter {
	return stopping(append(isMmap[:len(isMmap):len(isMmap)],
		check{offArgs + 2*8, wantProt},
		check{offArgs + 2*8 + 4, 0},
		check{offArgs + 3*8, ownFlags},
		check{offArgs + 3*8 + 4, 0},
	))
}

// skipping is the program p, but that a system call is skipped, and returns 0.
func skipping(number uint32, p []unix.SockFilter) []unix.SockFilter {
	return append([]unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offArch},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AUDIT_ARCH_X86_64, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offNumber},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: number, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO},
	}, p...)
}

// stopping is the program that stops where all checks hold.
func stopping(checks []check) []unix.SockFilter {
	var p []unix.SockFilter
	for i, c := range checks {
		// Behind the checks: TRACE, ALLOW. A check that fails jumps to ALLOW.
		rest := len(checks) - i - 1
		p = append(p,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: c.offset},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: uint8(2*rest + 1), K: c.value})
	}
	return append(p,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_TRACE},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
}

// program lays out the filter and the struct sock_fprog that points to it, as
// they stand at address addr of a process. The latter comes first.
func program(p []unix.SockFilter, addr uint64) []byte {
	const fprogSize = 16 // u16 len, padding, pointer
	b := make([]byte, fprogSize, fprogSize+8*len(p))
	binary.NativeEndian.PutUint16(b, uint16(len(p)))
	binary.NativeEndian.PutUint64(b[8:], addr+fprogSize)
	for _, i := range p {
		b = binary.NativeEndian.AppendUint16(b, i.Code)
		b = append(b, i.Jt, i.Jf)
		b = binary.NativeEndian.AppendUint32(b, i.K)
	}
	return b
}
